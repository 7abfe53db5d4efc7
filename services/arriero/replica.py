"""How a replica runs: the one form in which its settings travel.

Responsibility: names, defaults and checks of what a deployment may set, and the
environment variables that carry it from the orchestrator to a replica, whoever
starts that. Does not know endpoints, platforms or llama.cpp.

A platform passes `environment()` on as it is and need not know what it means.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

from arriero import refs
from arriero.errors import InvalidArgument

__all__ = [
    "ADAPTERS_VARIABLE",
    "CACHE_TYPES",
    "ROPE_TYPES",
    "AdapterSettings",
    "ReplicaSettings",
    "RopeSettings",
]

# A replica that runs is told of other adapters by RPC; this is what a new one starts
# with. Another value of any other variable needs another replica.
ADAPTERS_VARIABLE = "ARRIERO_ADAPTERS"

# What llama.cpp takes for K and V.
CACHE_TYPES = ("F16", "BF16", "F32", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL")
_WHOLE = frozenset({"F16", "BF16", "F32"})
FLASH_ATTENTION = ("auto", "on", "off")
ROPE_TYPES = ("none", "linear", "yarn", "ntk")
BACKENDS = ("auto", "llama.cpp", "transformers")
_BACKEND_OF = {"gguf": "llama.cpp", "model": "transformers"}
_LLAMA_ONLY = (
    "mmap",
    "mlock",
    "repack",
    "cache_type_k",
    "cache_type_v",
    "flash_attention",
    "rope",
    "adapters",
)
# llama_max_parallel_sequences().
MAX_SLOTS = 256
_YARN = ("yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow")


@dataclass(frozen=True, slots=True)
class RopeSettings:
    """Rotary positions beyond the trained context."""

    type: str = ""
    """`none`, `linear`, `yarn`, `ntk`; empty: what the model says."""
    factor: float | None = None
    """How many times longer; of `ntk` the factor that alpha is computed with."""
    alpha: float | None = None
    """Of `ntk`, instead of the one computed from the context."""
    yarn_ext_factor: float = -1.0
    """llama.cpp's; -1 is the model's."""
    yarn_attn_factor: float = -1.0
    """llama.cpp's; -1 is the model's."""
    yarn_beta_fast: float = -1.0
    """llama.cpp's; -1 is the model's."""
    yarn_beta_slow: float = -1.0
    """llama.cpp's; -1 is the model's."""
    yarn_original_context: int = 0
    """Tokens before scaling; 0 for the trained ones."""
    native_slots: int = 0
    """Slots of an unscaled context for requests that fit it; 0 for none."""

    def check(self) -> None:
        """Refuse what is unknown or contradicts itself.

        Raises:
            InvalidArgument: on fields `rope.…`.
        """
        if self.type and self.type not in ROPE_TYPES:
            raise InvalidArgument.field(
                "rope.type", f"{self.type!r} is unknown; expected {', '.join(ROPE_TYPES)}"
            )
        belongs = {
            "factor": ("linear", "yarn", "ntk"),
            "alpha": ("ntk",),
            "native_slots": ("linear", "yarn", "ntk"),
            **dict.fromkeys((*_YARN, "yarn_original_context"), ("yarn",)),
        }
        plain = RopeSettings()
        for name, types in belongs.items():
            value = getattr(self, name)
            if value == getattr(plain, name):
                continue
            if self.type not in types:
                raise InvalidArgument.field(
                    f"rope.{name}",
                    f"belongs to rope.type {' or '.join(types)}, and rope.type is "
                    f"{self.type or 'not set'}",
                )
            if not math.isfinite(value) or value < 0:
                raise InvalidArgument.field(
                    f"rope.{name}", f"{value:g} is not a finite number from 0 up"
                )
        if self.yarn_attn_factor >= 0 and self.yarn_ext_factor != 0:
            raise InvalidArgument.field(
                "rope.yarn_attn_factor",
                "is computed by llama.cpp unless rope.yarn_ext_factor is 0; leave it out",
            )
        if self.native_slots > MAX_SLOTS:
            raise InvalidArgument.field(
                "rope.native_slots", f"{self.native_slots} is not between 0 and {MAX_SLOTS}"
            )
        for name in ("factor", "alpha"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidArgument.field(
                    f"rope.{name}", f"{value:g} would shorten the context; expected 1 or more"
                )
        if self.factor is not None and self.alpha is not None:
            raise InvalidArgument.field(
                "rope.alpha", "and rope.factor exclude each other: alpha is computed from factor"
            )


@dataclass(frozen=True, slots=True)
class AdapterSettings:
    """A LoRA adapter beside the model."""

    name: str
    """That requests choose it by; empty before it is known: the artifact's own."""
    adapter: str
    """Digest of the artifact."""
    scale: float = 1.0
    """Its change of the model is multiplied by this."""

    def check(self, path: str) -> None:
        """Refuse a name that is none, and a scale that is no number.

        Raises:
            InvalidArgument: on fields under `path`.
        """
        if self.name and not refs.is_name(self.name):
            raise InvalidArgument.field(
                f"{path}.name",
                f"{self.name!r} is not a name; expected lower case letters, digits, '.', '_' "
                "and '-'",
            )
        if not math.isfinite(self.scale):
            raise InvalidArgument.field(f"{path}.scale", f"{self.scale} is not a finite number")


@dataclass(frozen=True, slots=True)
class ReplicaSettings:
    """What a deployment says about each of its replicas."""

    context: int = 0
    """Tokens per slot; 0 for the model's own, at most 4096."""
    slots: int = 4
    """Streams that run at the same time."""
    queue: int = 64
    """Requests that may wait for a slot; further ones are refused."""
    threads: int = 0
    """0 for what the machine grants, less one."""
    gpu_layers: int = 0
    """Layers to put on a GPU; -1 for all."""
    mmap: bool = True
    """Map the file, so that replicas share its pages."""
    repack: bool = True
    """Lay out weights of some types for the CPU, in memory of each replica's own."""
    mlock: bool = False
    """Keep the weights from being swapped out."""
    cache_type_k: str = "F16"
    """ggml type of the cached keys."""
    cache_type_v: str = "F16"
    """ggml type of the cached values."""
    flash_attention: str = "auto"
    """`auto`, `on` or `off`."""
    rope: RopeSettings = field(default_factory=RopeSettings)
    """Positions beyond the trained context."""
    adapters: tuple[AdapterSettings, ...] = ()
    """Loaded before the replica is ready."""
    backend: str = "auto"
    """`llama.cpp`, `transformers`, or `auto`: by what is served."""

    def check(self) -> None:
        """Refuse what is unknown, out of range, or contradicts itself.

        Raises:
            InvalidArgument: with the fields' names as a deploy stage has them.
        """
        for name, least, most in (
            ("context", 0, 1 << 30),
            ("slots", 1, MAX_SLOTS),
            ("queue", 0, 1 << 20),
            ("threads", 0, 512),
            ("gpu_layers", -1, 1 << 20),
        ):
            if not least <= (value := getattr(self, name)) <= most:
                raise InvalidArgument.field(name, f"{value} is not between {least} and {most}")
        for name in ("cache_type_k", "cache_type_v"):
            if (kind := getattr(self, name)) not in CACHE_TYPES:
                raise InvalidArgument.field(
                    name, f"{kind!r} is unknown; expected {', '.join(CACHE_TYPES)}"
                )
        if self.flash_attention not in FLASH_ATTENTION:
            raise InvalidArgument.field(
                "flash_attention",
                f"{self.flash_attention!r} is unknown; expected {', '.join(FLASH_ATTENTION)}",
            )
        if self.cache_type_v not in _WHOLE and self.flash_attention == "off":
            raise InvalidArgument.field(
                "cache_type_v",
                f"{self.cache_type_v} needs flash attention, which flash_attention turns off",
            )
        if self.backend not in BACKENDS:
            raise InvalidArgument.field(
                "backend", f"{self.backend!r} is unknown; expected {', '.join(BACKENDS)}"
            )
        self.rope.check()
        _check_adapters(self.adapters)
        if self.backend == "transformers":
            self.check_backend("transformers")

    def backend_of(self, kind: str) -> str:
        """Which backend serves an artifact of this kind.

        Raises:
            InvalidArgument: not the one that is asked for, or settings that it does not have.
        """
        found = _BACKEND_OF.get(kind)
        if found is None or self.backend not in ("auto", found):
            raise InvalidArgument.field(
                "backend",
                f"{self.backend} does not serve artifacts of kind {kind}; llama.cpp serves gguf, "
                "transformers serves model",
            )
        self.check_backend(found)
        return found

    def check_backend(self, backend: str) -> None:
        """Refuse settings that a backend does not have.

        Raises:
            InvalidArgument: with the field.
        """
        if backend == "llama.cpp":
            return
        plain = ReplicaSettings()
        for name in _LLAMA_ONLY:
            if getattr(self, name) != getattr(plain, name):
                raise InvalidArgument.field(
                    name, f"is llama.cpp's, and the backend is {backend}; leave it out"
                )

    @classmethod
    def of_spec(cls, spec: Any) -> ReplicaSettings:
        """The settings in a `DeploySpec` (or what has its fields), its defaults filled in.

        Raises:
            InvalidArgument: as `check`.
        """
        read: dict[str, Any] = {}
        for known in fields(cls):
            if known.name == "rope":
                read["rope"] = _of_message(RopeSettings, spec.rope)
            elif known.name == "adapters":
                read["adapters"] = tuple(_of_message(AdapterSettings, a) for a in spec.adapters)
            else:
                read[known.name] = getattr(spec, known.name)
        for name in ("cache_type_k", "cache_type_v"):
            read[name] = read[name].upper()
        found = cls(**read)
        found.check()
        return found

    def environment(self) -> dict[str, str]:
        """All of it as variables: `ARRIERO_CONTEXT`, …, `ARRIERO_ROPE_TYPE`, …"""
        adapters = json.dumps([asdict(item) for item in self.adapters]) if self.adapters else ""
        return {
            **_written(self, "ARRIERO_"),
            **_written(self.rope, "ARRIERO_ROPE_"),
            ADAPTERS_VARIABLE: adapters,
        }

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> ReplicaSettings:
        """The inverse of `environment`; an empty variable counts as unset.

        Raises:
            InvalidArgument: a variable that is not what it should be, or as `check`.
        """
        env = os.environ if env is None else env
        rope = RopeSettings(**_read(RopeSettings, "ARRIERO_ROPE_", env))
        adapters = _read_adapters(env.get(ADAPTERS_VARIABLE, ""))
        found = cls(**_read(cls, "ARRIERO_", env), rope=rope, adapters=adapters)
        found.check()
        return found


_S = TypeVar("_S", RopeSettings, AdapterSettings)


def _of_message(kind: type[_S], message: Any) -> _S:
    """Only what is set: an unset message's own defaults were not filled in."""
    plain = {"name": ""} if kind is AdapterSettings else {}
    return kind(**{**plain, **{f.name: value for f, value in message.ListFields()}})


def _check_adapters(adapters: Sequence[AdapterSettings]) -> None:
    seen: set[str] = set()
    for index, item in enumerate(adapters):
        item.check(f"adapters[{index}]")
        if item.name and item.name in seen:
            raise InvalidArgument.field(
                f"adapters[{index}].name", f"{item.name!r} is there twice; requests choose by it"
            )
        seen.add(item.name)


def _read_adapters(text: str) -> tuple[AdapterSettings, ...]:
    try:
        return tuple(AdapterSettings(**item) for item in json.loads(text or "[]"))
    except (ValueError, TypeError) as error:
        raise InvalidArgument.field(
            ADAPTERS_VARIABLE, f"is no JSON list of adapters: {error}"
        ) from None


def _written(settings: Any, prefix: str) -> dict[str, str]:
    found = {}
    for known in fields(settings):
        value = getattr(settings, known.name)
        if isinstance(value, bool):
            text = "true" if value else "false"
        elif isinstance(value, int | float | str):
            text = repr(value) if isinstance(value, float) else str(value)
        elif value is None:
            text = ""
        else:
            continue
        found[prefix + known.name.upper()] = text
    return found


def _read(kind: type, prefix: str, env: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for known in fields(kind):
        name = prefix + known.name.upper()
        text = env.get(name, "")
        if text == "" or known.name in ("rope", "adapters"):
            continue
        try:
            found[known.name] = _parsed(text, str(known.type))
        except (ValueError, KeyError):
            raise InvalidArgument.field(
                name, f"{text!r} is not {_WANTED[str(known.type)]}"
            ) from None
    return found


_WANTED = {
    "int": "a whole number",
    "float": "a number",
    "float | None": "a number",
    "bool": "true or false",
}


def _parsed(text: str, kind: str) -> Any:
    if kind == "bool":
        return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
    if kind == "int":
        return int(text)
    return float(text) if kind.startswith("float") else text
