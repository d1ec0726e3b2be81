"""Types of the cache of keys and values, and the bytes a token takes in one.

| type | a head's keys (or values) of one token |
|---|---|
| float32, float16 | as they are, or rounded to nearest |
| int8 | codes round(x * 127 / max|x|), one float32 scale |
| fp8 | E4M3 (OCP 8-bit floating point, revision 1.0), one bfloat16 scale: max|x| / 448, rounded up; on a GPU float32 |
"""

from __future__ import annotations

from collections.abc import Callable

from edgelm.errors import EdgeLMError

_ROWS: dict[str, Callable[[int], int]] = {
    "float32": lambda width: 4 * width,
    "float16": lambda width: 2 * width,
    "int8": lambda width: width + 4,
    "fp8": lambda width: width + 2,
}

KV_TYPES = tuple(_ROWS)
"""What a cache can be with native operators; portable ones have float32, and float16 or bfloat16 on a GPU."""


def require_type(kv: str) -> str:
    """`kv`, if it is one of KV_TYPES.

    Raises:
        EdgeLMError: there is no such type.
    """
    if kv not in _ROWS:
        raise EdgeLMError(f"kv is {kv!r}: the cache can be {', '.join(_ROWS)}")
    return kv


def row_bytes(kv: str, head_dim: int, ops: str = "native") -> int:
    """Bytes of one head's keys, and again of its values, of one token; bfloat16, which only GPUs have, too.

    `ops`: a bundle's operator set. GPU kernels ("gpu") scale fp8 by a float32, as they do int8.

    Raises:
        EdgeLMError: there is no such type.
    """
    if kv == "fp8" and ops == "gpu":
        kv = "int8"
    return 2 * head_dim if kv == "bfloat16" else _ROWS[require_type(kv)](head_dim)
