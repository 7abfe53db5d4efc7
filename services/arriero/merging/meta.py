"""Meta's own layout of LLaMA checkpoints, beside Hugging Face's.

Responsibility: what the tensors are called there, how they are split over the
ranks of model parallelism, how the rows of wq and wk are ordered, and what
`params.json` says. Does not read or write files.

Sources: the reference implementations that Meta published with LLaMA, Llama 2
and Llama 3 (`ModelArgs`, `FeedForward`, `apply_rotary_emb`; fairscale's
Column- and RowParallelLinear).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from arriero.errors import FailedPrecondition, InvalidArgument

if TYPE_CHECKING:
    import torch

__all__ = [
    "IGNORED",
    "Params",
    "Place",
    "default_shards",
    "hidden_dim",
    "hugging_face_name",
    "joined",
    "place_of",
    "split",
]

# Buffers that every loader makes anew.
IGNORED = ("rope.freqs",)
# Rows are taken in blocks of at most so many bytes.
BLOCK_BYTES = 1 << 26

# Hugging Face's name -> Meta's, and the axis that the ranks share (None: each has all).
_LAYER: Mapping[str, tuple[str, int | None]] = {
    "self_attn.q_proj": ("attention.wq", 0),
    "self_attn.k_proj": ("attention.wk", 0),
    "self_attn.v_proj": ("attention.wv", 0),
    "self_attn.o_proj": ("attention.wo", 1),
    "mlp.gate_proj": ("feed_forward.w1", 0),
    "mlp.down_proj": ("feed_forward.w2", 1),
    "mlp.up_proj": ("feed_forward.w3", 0),
    "input_layernorm": ("attention_norm", None),
    "post_attention_layernorm": ("ffn_norm", None),
}
# Llama 3 splits the embeddings by rows (axis 0), LLaMA and Llama 2 by columns.
_TOP: Mapping[str, tuple[str, int | None]] = {
    "model.embed_tokens": ("tok_embeddings", 1),
    "model.norm": ("norm", None),
    "lm_head": ("output", 0),
}
_FROM_META_LAYER = {theirs: ours for ours, (theirs, _) in _LAYER.items()}
_FROM_META_TOP = {theirs: ours for ours, (theirs, _) in _TOP.items()}
_META_NAME = re.compile(r"layers\.(\d+)\.(.+)\.weight")
_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")
# Of Llama 3.1's scaled rope; the reference code has these figures built in.
_SCALED_ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# Llama 3.2 1B and 3B scale by 32, all others by 8.
_SCALED_BY_32 = (2048, 3072)
_ROPE_THETA = 10000.0
# Llama 3's; Code Llama has another one.
_LLAMA_3_THETA = 500000.0
# What transformers takes where a configuration is silent; Meta's code takes 1e-5.
_NORM_EPS = 1e-6
# `multiple_of` and `ffn_dim_multiplier` that Meta has used.
_MULTIPLES = (256, 1024, 4096, 512, 2048, 128, 64, 32, 16, 8, 4, 2, 1)
_MULTIPLIERS = (None, 1.3, 1.5, 1.4, 1.2, 1.0)
# Parameters up to which Meta ships so many files.
_SHARDS = ((10e9, 1), (20e9, 2), (50e9, 4), (math.inf, 8))


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor is in Meta's layout.

    Attributes:
        name: Meta's.
        axis: that the ranks share; None: each rank has all of it.
        rotary: rows of wq and wk, which Meta orders as pairs.
    """

    name: str
    axis: int | None
    rotary: bool = False


def place_of(name: str, *, vocabulary_rows: bool) -> Place:
    """Meta's place of a tensor by its Hugging Face name.

    Args:
        name: such as `model.layers.0.self_attn.q_proj.weight`.
        vocabulary_rows: the embeddings are split by rows, as in Llama 3.

    Raises:
        FailedPrecondition: Meta's layout has no such tensor.
    """
    found = _NAME.fullmatch(name)
    if found and found[2] in _LAYER:
        theirs, axis = _LAYER[found[2]]
        return Place(
            f"layers.{found[1]}.{theirs}.weight", axis, theirs in ("attention.wq", "attention.wk")
        )
    entry = _TOP.get(name.removesuffix(".weight"))
    if entry is None:
        raise FailedPrecondition(
            f"{name} has no place in Meta's layout; only plain LLaMA models (no biases, no norms "
            "of queries and keys) can be written so: export with format: hf"
        )
    theirs, axis = entry
    if theirs == "tok_embeddings" and vocabulary_rows:
        axis = 0
    return Place(f"{theirs}.weight", axis)


def hugging_face_name(name: str) -> str:
    """The Hugging Face name of one of Meta's tensors.

    Raises:
        FailedPrecondition: not a tensor of a LLaMA model.
    """
    found = _META_NAME.fullmatch(name)
    if found and found[2] in _FROM_META_LAYER:
        return f"model.layers.{found[1]}.{_FROM_META_LAYER[found[2]]}.weight"
    plain = name.removesuffix(".weight")
    if plain in _FROM_META_TOP:
        return f"{_FROM_META_TOP[plain]}.weight"
    raise FailedPrecondition(
        f"{name} is not a tensor of Meta's LLaMA models; expected names such as "
        "layers.0.attention.wq.weight"
    )


# --- rows -----------------------------------------------------------------------------


def joined(parts: Sequence[torch.Tensor], place: Place, head_dim: int) -> Iterator[torch.Tensor]:
    """A tensor of Hugging Face's layout in blocks of rows, from its parts at the ranks."""
    import torch

    if place.axis is None:
        yield parts[0]
    elif place.axis == 0:
        for part in parts:
            for block in _blocks(part, head_dim if place.rotary else 1):
                yield _halves(block, head_dim) if place.rotary else block
    else:
        rows = sum(part.shape[1] for part in parts) * parts[0].element_size()
        step = max(1, BLOCK_BYTES // max(1, rows))
        for start in range(0, parts[0].shape[0], step):
            yield torch.cat([part[start : start + step] for part in parts], dim=1)


def split(
    tensor: torch.Tensor, place: Place, rank: int, ranks: int, head_dim: int
) -> Iterator[torch.Tensor]:
    """One rank's part of a tensor of Hugging Face's layout, in blocks of rows."""
    if place.axis is None:
        yield tensor
        return
    width = tensor.shape[place.axis] // ranks
    part = tensor.narrow(place.axis, rank * width, width)
    for block in _blocks(part, head_dim if place.rotary else 1):
        yield _pairs(block, head_dim) if place.rotary else block


def _blocks(tensor: torch.Tensor, unit: int) -> Iterator[torch.Tensor]:
    """Rows in blocks of whole units."""
    row = max(1, tensor.shape[1] * tensor.element_size() if tensor.dim() > 1 else 1)
    step = max(1, BLOCK_BYTES // (row * unit)) * unit
    for start in range(0, tensor.shape[0], step):
        yield tensor[start : start + step]


def _halves(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Of each head, rows (0, 1), (2, 3) ... -> the first of each pair, then the second.

    Meta's code rotates neighbours, Hugging Face's the two halves of a head.
    """
    heads, width = rows.shape[0] // head_dim, rows.shape[1]
    return rows.reshape(heads, head_dim // 2, 2, width).transpose(1, 2).reshape(-1, width)


def _pairs(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The inverse of `_halves`."""
    heads, width = rows.shape[0] // head_dim, rows.shape[1]
    return rows.reshape(heads, 2, head_dim // 2, width).transpose(1, 2).reshape(-1, width)


# --- params.json ----------------------------------------------------------------------


def hidden_dim(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """The width of the feed-forward layers, as `FeedForward` computes it."""
    inner = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        inner = int(multiplier * inner)
    return multiple_of * ((inner + multiple_of - 1) // multiple_of)


def _inner_params(dim: int, inner: int) -> dict[str, Any]:
    """`multiple_of` and `ffn_dim_multiplier` from which Meta's code computes `inner`."""
    for multiplier in _MULTIPLIERS:
        for multiple in _MULTIPLES:
            if inner % multiple == 0 and hidden_dim(dim, multiple, multiplier) == inner:
                found: dict[str, Any] = {"multiple_of": multiple}
                if multiplier is not None:
                    found["ffn_dim_multiplier"] = multiplier
                return found
    base = int(2 * (4 * dim) / 3)
    for multiple in _MULTIPLES:
        for digits in range(1, 13):
            multiplier = round((inner - multiple // 2 + 0.5) / base, digits)
            if inner % multiple == 0 and hidden_dim(dim, multiple, multiplier) == inner:
                return {"multiple_of": multiple, "ffn_dim_multiplier": multiplier}
    raise FailedPrecondition(  # not seen: with multiple_of 1 every width has a multiplier
        f"no multiple_of and ffn_dim_multiplier make {inner} of {dim}; export with format: hf"
    )


@dataclass(frozen=True, slots=True)
class Params:
    """What `params.json` says, with the reference code's defaults."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    inner: int
    norm_eps: float
    rope_theta: float
    scaled_rope: bool
    vocab_size: int
    max_seq_len: int

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.dim // self.n_heads

    @classmethod
    def from_json(cls, data: Any) -> Params:
        """Read `params.json`.

        `vocab_size` is -1 where the file leaves it to the tokenizer,
        `max_seq_len` 0 where it is silent.

        Raises:
            FailedPrecondition: a size is missing or no number; a mixture of experts.
        """
        if not isinstance(data, dict):
            raise FailedPrecondition("params.json is not a JSON object")
        if "moe" in data or "moe_args" in data:
            raise FailedPrecondition(
                "params.json describes a mixture of experts; only dense LLaMA models are read"
            )
        # Repositories of vision models and of Llama 4 have it one level down.
        if "dim" not in data and isinstance(data.get("model"), dict):
            data = data["model"]
        try:
            dim, heads = int(data["dim"]), int(data["n_heads"])
            multiplier = data.get("ffn_dim_multiplier")
            params = cls(
                dim=dim,
                n_layers=int(data["n_layers"]),
                n_heads=heads,
                n_kv_heads=int(data.get("n_kv_heads") or heads),
                inner=hidden_dim(
                    dim,
                    int(data.get("multiple_of", 256)),
                    None if multiplier is None else float(multiplier),
                ),
                norm_eps=float(data.get("norm_eps", 1e-5)),
                rope_theta=float(data.get("rope_theta", _ROPE_THETA)),
                scaled_rope=bool(data.get("use_scaled_rope", False)),
                vocab_size=int(data.get("vocab_size", -1)),
                max_seq_len=int(data.get("max_seq_len", 0)),
            )
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise FailedPrecondition(
                f"params.json lacks a size ({type(error).__name__}: {error}); expected dim, "
                "n_layers and n_heads"
            ) from error
        if min(dim, heads, params.n_layers, params.n_kv_heads) < 1 or dim % heads:
            raise FailedPrecondition(
                f"params.json says dim {dim} with {heads} heads in {params.n_layers} layers; "
                "expected positive sizes, the heads dividing dim"
            )
        return params

    def config(self, *, vocabulary: int, tied: bool, dtype: str, tiktoken: bool) -> dict[str, Any]:
        """`config.json` of the same model; its context length is `context(...)`'s guess."""
        config: dict[str, Any] = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": vocabulary,
            "hidden_size": self.dim,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.context(tiktoken=tiktoken),
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "initializer_range": 0.02,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": tied,
            "use_cache": True,
            "torch_dtype": dtype,
        }
        if self.scaled_rope:
            factor = 32.0 if self.dim in _SCALED_BY_32 else 8.0
            config["rope_scaling"] = {**_SCALED_ROPE, "factor": factor}
        return config

    def context(self, *, tiktoken: bool) -> int:
        """Tokens of context: what the file says, else what Meta's release of this kind has."""
        if self.max_seq_len:
            return self.max_seq_len
        if self.scaled_rope:
            return 131072
        if tiktoken or self.rope_theta == _LLAMA_3_THETA:
            return 8192
        if self.rope_theta != _ROPE_THETA:  # Code Llama
            return 16384
        first = self.norm_eps == 1e-6 or self.dim == 6656
        first = first or (self.dim == 8192 and self.n_kv_heads == self.n_heads)
        return 2048 if first else 4096

    @classmethod
    def json_of(cls, config: Mapping[str, Any], *, vocabulary: int) -> dict[str, Any]:
        """`params.json` of a Hugging Face configuration; only what differs from the defaults.

        The reference code takes every entry for an argument, so an older one
        would not start with a newer one's entries.

        Raises:
            FailedPrecondition: what Meta's code cannot express.
        """
        dim, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        groups = int(config.get("num_key_value_heads") or heads)
        head = int(config.get("head_dim") or dim // heads)
        if head * heads != dim:
            raise FailedPrecondition(
                f"heads are {head} wide; Meta's code computes {dim} / {heads} = {dim // heads}: "
                "export with format: hf"
            )
        act = config.get("hidden_act", "silu")
        if act != "silu":
            raise FailedPrecondition(
                f"hidden_act is {act!r}; Meta's code has silu built in: export with format: hf"
            )
        rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
        theta = float(rope.get("rope_theta", config.get("rope_theta", _ROPE_THETA)))
        params: dict[str, Any] = {
            "dim": dim,
            "n_layers": int(config["num_hidden_layers"]),
            "n_heads": heads,
            **({"n_kv_heads": groups} if groups != heads else {}),
            **_inner_params(dim, int(config["intermediate_size"])),
            "norm_eps": float(config.get("rms_norm_eps", _NORM_EPS)),
            "vocab_size": vocabulary,
            **({"rope_theta": theta} if theta != _ROPE_THETA else {}),
        }
        kind = str(rope.get("rope_type", rope.get("type", "default")))
        if kind == "llama3":
            factor = 32.0 if dim in _SCALED_BY_32 else 8.0
            expected = {**_SCALED_ROPE, "factor": factor}
            other = {
                key: rope.get(key) for key, value in expected.items() if rope.get(key) != value
            }
            if other:
                raise FailedPrecondition(
                    f"rope scaling has {other}; Meta's code has {expected} built in: export with "
                    "format: hf"
                )
            params["use_scaled_rope"] = True
        elif kind != "default":
            raise FailedPrecondition(
                f"rope scaling of type {kind!r} is unknown to Meta's code; export with format: hf"
            )
        return params


def default_shards(parameters: int) -> int:
    """Files as Meta ships that size: 7B 1, 13B 2, 33B 4, 65B and 70B 8."""
    return next(count for limit, count in _SHARDS if parameters <= limit)


def check_shards(config: Mapping[str, Any], vocabulary: int, shards: int) -> None:
    """Refuse a number of ranks that does not divide what the ranks share.

    Raises:
        InvalidArgument: with every size that it does not divide.
    """
    heads = int(config["num_attention_heads"])
    shared = {
        "hidden_size": int(config["hidden_size"]),
        "num_attention_heads": heads,
        "num_key_value_heads": int(config.get("num_key_value_heads") or heads),
        "intermediate_size": int(config["intermediate_size"]),
        "vocab_size": vocabulary,
    }
    wrong = [f"{name} {size}" for name, size in shared.items() if size % shards]
    if wrong:
        raise InvalidArgument.field(
            "shards",
            f"{shards} does not divide {', '.join(wrong)}; expected a number that divides all of "
            "them, 1 always does",
        )
