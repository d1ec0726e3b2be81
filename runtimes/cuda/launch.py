"""What is launched: a kernel's name, its grid, and its arguments as the bytes of one struct."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    Attributes:
        kernel: the name under which it was instantiated.
        grid: blocks in x, y, z.
        block: threads of a block, in x alone.
        shared: bytes of dynamic shared memory.
        args: the kernel's only parameter, a struct, as bytes in the device's layout (little-endian, naturally aligned).
    """

    kernel: str
    grid: tuple[int, int, int]
    block: int
    shared: int
    args: bytes
