"""A loaded GGUF model: its vocabulary and its metadata.

Responsibility: load, tokenize, look up. Does not know contexts or sampling.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from arriero.errors import DataLoss, InvalidArgument, NotFound, ResourceExhausted
from arriero.llama import library
from arriero.llama.header import Header, read_header


class Model:
    """A GGUF model, memory-mapped; `with` frees it.

    The file's header is checked before llama.cpp sees it. Contexts made over a
    model must be closed before it.

    Args:
        path: of the file.
        n_gpu_layers: layers to offload; negative for all (builds without a GPU ignore it).
        vocab_only: load no weights: tokenizing and metadata only, in milliseconds.
        use_mmap: share the file's pages with other processes.
        use_mlock: keep the weights from being swapped out; a warning where the
            limit on locked memory is too low.
        use_extra_bufts: let the CPU backend repack weights into a faster private
            copy (Q4_0 and others); False keeps them shared.

    Raises:
        NotFound: no such file.
        DataLoss: llama.cpp or the header check refuses the file.
        ResourceExhausted: no memory for it, of the host or of a GPU.
        FailedPrecondition: llama.cpp cannot be loaded.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        n_gpu_layers: int = 0,
        vocab_only: bool = False,
        use_mmap: bool = True,
        use_mlock: bool = False,
        use_extra_bufts: bool = True,
    ) -> None:
        self._model: Any = None
        self.path = Path(path)
        if not self.path.is_file():
            raise NotFound(f"{self.path.name} is not a file; expected a GGUF model")
        self.header: Header = read_header(self.path)
        self._c = library.initialize()
        params = self._c.llama_model_default_params()
        params.n_gpu_layers = n_gpu_layers
        params.vocab_only = vocab_only
        params.use_extra_bufts = use_extra_bufts
        modes = ("NONE", "MMAP"), ("MLOCK", "MMAP_MLOCK")
        mode = modes[use_mlock][use_mmap]
        params.load_mode = getattr(self._c, f"LLAMA_LOAD_MODE_{mode}")
        library.take_errors()
        self._model = self._c.llama_model_load_from_file(str(self.path).encode(), params)
        if not self._model:
            why = library.take_errors() or "no reason given"
            if library.ran_out(why):
                raise ResourceExhausted(
                    f"no memory for {self.path.name}: {why}; take a smaller quant type, fewer "
                    "gpu_layers, or a machine with more memory"
                )
            raise DataLoss(
                f"llama.cpp cannot load {self.path.name}: {why}; expected a GGUF model that "
                "this build supports"
            )
        self._vocab: Any = self._c.llama_model_get_vocab(self._model)
        self.n_vocab = int(self._c.llama_vocab_n_tokens(self._vocab))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the model; safe to call twice."""
        if self._model:
            self._c.llama_model_free(self._model)
            self._model = None

    def __del__(self) -> None:
        self.close()

    @property
    def handle(self) -> Any:
        """The `llama_model` pointer, for the rest of this package and the binding."""
        return self._model

    @property
    def vocabulary(self) -> Any:
        """The `llama_vocab` pointer, for samplers."""
        return self._vocab

    # -- facts ---------------------------------------------------------------

    @functools.cached_property
    def metadata(self) -> dict[str, str]:
        """Every scalar and string of the file's metadata, as text; no arrays."""
        return {key: str(value) for key, value in self.header.metadata.items()}

    @property
    def chat_template(self) -> str | None:
        """The Jinja source stored with the model."""
        return self.metadata.get("tokenizer.chat_template")

    @functools.cached_property
    def description(self) -> str:
        """Such as `llama 135M Q4_K - Medium`."""
        buffer = ctypes.create_string_buffer(256)
        self._c.llama_model_desc(self._model, buffer, len(buffer))
        return buffer.value.decode("utf-8", "replace")

    @property
    def n_ctx_train(self) -> int:
        """Tokens of context that it was trained with; 0 where the file does not say."""
        return int(self._of_architecture("context_length", 0))

    @property
    def pooling(self) -> str:
        """How the file says that tokens become one vector; empty where it says nothing."""
        kinds = ("", "mean", "cls", "last", "rank")
        number = int(self._of_architecture("pooling_type", 0))
        return kinds[number] if 0 <= number < len(kinds) else "unknown"

    @property
    def rope_freq_base(self) -> float:
        """The rope base frequency of the file; 10,000 where it names none, as in llama.cpp."""
        return float(self._of_architecture("rope.freq_base", 10000.0))

    @property
    def rope_dimensions(self) -> int:
        """Dimensions of each head that turn with the position."""
        heads = max(int(self._of_architecture("attention.head_count", 1)), 1)
        head = self._of_architecture(
            "attention.key_length", int(self._of_architecture("embedding_length", 0)) // heads
        )
        return int(self._of_architecture("rope.dimension_count", head))

    @property
    def rope_scaling(self) -> tuple[str, float]:
        """The scaling that the file names (`none`, `linear`, `yarn`, ...) and its factor."""
        factor = float(
            self._of_architecture("rope.scaling.factor", 0)
            or self._of_architecture("rope.scale_linear", 0)
            or 1.0
        )
        plain = "none" if factor == 1.0 else "linear"
        return str(self._of_architecture("rope.scaling.type", plain)), factor

    def _of_architecture(self, key: str, default: Any) -> Any:
        architecture = self.header.metadata.get("general.architecture", "")
        return self.header.metadata.get(f"{architecture}.{key}", default)

    # -- vocabulary ----------------------------------------------------------

    @property
    def bos(self) -> int | None:
        """Id of the beginning-of-sequence token."""
        return self._token(self._c.llama_vocab_bos)

    @property
    def eos(self) -> int | None:
        """Id of the end-of-sequence token."""
        return self._token(self._c.llama_vocab_eos)

    @property
    def adds_bos(self) -> bool:
        """Whether `tokenize(add_special=True)` puts BOS first."""
        return bool(self._c.llama_vocab_get_add_bos(self._vocab))

    @functools.cached_property
    def eog(self) -> frozenset[int]:
        """Every token that ends a generation (EOS, end of turn, ...)."""
        is_eog = self._c.llama_vocab_is_eog
        return frozenset(t for t in range(self.n_vocab) if is_eog(self._vocab, t))

    def _token(self, function: Any) -> int | None:
        token = int(function(self._vocab))
        return token if token >= 0 else None

    def tokenize(
        self, text: str, *, add_special: bool = True, parse_special: bool = True
    ) -> list[int]:
        """Token ids of a text.

        Args:
            text: any Unicode text; lone surrogates become `?`.
            add_special: add BOS and EOS as the model is configured to.
            parse_special: read special tokens that are written in the text
                (`<s>`, `<|im_start|>`); False takes them as plain characters.
        """
        data = text.encode("utf-8", "replace")
        room = len(data) + 8  # at most one token per byte, BOS, EOS and a space prefix
        while True:
            buffer = (self._c.llama_token * room)()
            count = self._c.llama_tokenize(
                self._vocab, data, len(data), buffer, room, add_special, parse_special
            )
            if count >= 0:
                return list(buffer[:count])
            if -count <= room:  # INT32_MIN: more tokens than an int32 can count
                raise InvalidArgument(f"a text of {len(data)} bytes is too long to tokenize")
            room = -count

    def token_to_piece(self, token: int, *, special: bool = True) -> bytes:
        """Bytes that a token stands for: not always whole UTF-8 characters.

        Args:
            token: its id.
            special: render special tokens too; False makes them empty.

        Raises:
            InvalidArgument: no such id.
        """
        if not 0 <= token < self.n_vocab:
            raise InvalidArgument(f"token {token} is outside of the vocabulary (0..{self.n_vocab})")
        room = 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            length = self._c.llama_token_to_piece(self._vocab, token, buffer, room, 0, special)
            if length >= 0:
                return buffer.raw[:length]
            room = -length

    def pieces(self, *, special: bool = False) -> list[bytes]:
        """The whole piece table, by token id."""
        return [self.token_to_piece(token, special=special) for token in range(self.n_vocab)]

    def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """Text of token ids; incomplete characters become U+FFFD."""
        data = b"".join(self.token_to_piece(token, special=special) for token in tokens)
        return data.decode("utf-8", "replace")
