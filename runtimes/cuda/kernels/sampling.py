"""Launches of the kernels in sampling.cuh, which find what the host needs to know of logits to choose a token."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from edgelm.runtimes.cuda import planning
from edgelm.runtimes.cuda.device import Launch

ROW = np.dtype([("temperature", "<f4"), ("penalty", "<f4"), ("seen", "<i4"), ("wants", "<i4")])
"""SamplingRow in sampling_args.cuh, as is what follows."""
WANTS_SHORTLIST, WANTS_SUMS = 1, 2
RESULT = np.dtype(
    [("highest", "<f4"), ("top", "<f4"), ("best", "<i4"), ("bound", "<f4"), ("count", "<i4"), ("unused", "<i4", 3)]
)
SUM_SCALE = 2.0**44


def kernels() -> tuple[str, ...]:
    """Return the names of the kernels."""
    return tuple(planning.call("sampling_kernels", {}).decode().split())


@dataclass(frozen=True)
class SamplingSizes:
    """What sampling needs for each row.

    Attributes:
        workspace: bytes of scratch memory.
        seen: bytes of the penalised tokens' bits.
        result: bytes of a result: `RESULT`, then logits float32 [listed], ids int32 [listed], sums uint64 [segments].
        listed: the most tokens of a shortlist.
        segment: consecutive tokens whose exponentials are one sum.
        segments: number of sums.
    """

    workspace: int
    seen: int
    result: int
    listed: int
    segment: int
    segments: int


def sizes(columns: int) -> SamplingSizes | None:
    """Return the sizes for a vocabulary of `columns` tokens; None if it is too large for the kernels."""
    found = planning.call("sampling_sizes", {"columns": columns})
    return SamplingSizes(*struct.unpack("<6q", found)) if found else None


def sampling_launches(
    logits: int, how: int, seen: int, results: int, rows: int, columns: int, workspace: int
) -> list[Launch]:
    """Return the launches of a step, which depend on no data.

    Args:
        logits: address of float32 [rows, columns].
        how: of `ROW` [rows].
        seen: of the penalised tokens' bits; those of `how` are added.
        results: receives the results.
        rows: number of rows.
        columns: tokens of the vocabulary.
        workspace: of scratch memory, aligned to 256 bytes.

    Raises:
        DeviceError: the vocabulary is too large.
    """
    fields = {"logits": logits, "how": how, "seen": seen, "results": results, "rows": rows, "columns": columns}
    return planning.launches("sampling_launches", {**fields, "workspace": workspace})
