"""Types of the KV cache, and the bytes that a token takes.

| type | keys (or values) of one head and token |
|---|---|
| float32 | float32 |
| float16 | rounded to nearest |
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
"""Cache types of the native operators. Portable ones have float32, and float16 or bfloat16 on a GPU."""
GPU_KV_TYPES = ("float16", "bfloat16", "float32", "int8", "fp8")
"""Cache types of our operators on GPUs; float32 with float32 activations only."""


def require_type(kv: str) -> str:
    """Check that `kv` is one of `KV_TYPES`, and return it.

    Raises:
        EdgeLMError: it is not.
    """
    if kv not in _ROWS:
        raise EdgeLMError(f"kv is {kv!r}: the KV cache can be {', '.join(_ROWS)}")
    return kv


def row_bytes(kv: str, head_dim: int, ops: str = "native") -> int:
    """Return the bytes of the keys of one head and token; its values take as many again.

    Args:
        kv: the cache's type, one of `KV_TYPES` or of `GPU_KV_TYPES`.
        head_dim: values of a head.
        ops: the bundle's operator set. The scale of fp8 is float32 for "gpu", as that of int8 is.

    Raises:
        EdgeLMError: there is no such type.
    """
    if kv == "fp8" and ops == "gpu":
        kv = "int8"
    return 2 * head_dim if kv == "bfloat16" else _ROWS[require_type(kv)](head_dim)
