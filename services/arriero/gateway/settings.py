"""What the gateway alone reads from its environment.

Responsibility: names, defaults and checks. Does not know what they are used for.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from arriero.errors import InvalidArgument

__all__ = ["GatewaySettings"]


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """Limits of the gateway.

    Read from `ARRIERO_GATEWAY_MAX_BODY_BYTES` and `ARRIERO_GATEWAY_TIMEOUT`.
    """

    max_body_bytes: int = 8 * 1024 * 1024
    """Larger request bodies are refused with 413 before they are read."""
    timeout_seconds: float = 600.0
    """How long a whole answer may take."""

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> GatewaySettings:
        """Read the settings.

        Raises:
            InvalidArgument: a variable does not hold a number above 0.
        """
        env = os.environ if env is None else env
        return cls(
            max_body_bytes=int(_positive(env, "ARRIERO_GATEWAY_MAX_BODY_BYTES", 8 * 1024 * 1024)),
            timeout_seconds=_positive(env, "ARRIERO_GATEWAY_TIMEOUT", 600.0),
        )


def _positive(env: Mapping[str, str], name: str, default: float) -> float:
    text = env.get(name, "")
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise InvalidArgument.field(name, f"{text!r} is not a number above 0")
    return value
