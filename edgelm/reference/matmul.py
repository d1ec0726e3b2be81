"""Matmuls whose sums do not depend on how many threads compute them.

PyTorch's own threads divide a matmul by their number, which changes the order of its sums and so its last bits. Inside
`reproducible` every matmul is divided by its shape alone, into blocks of `ROWS` weight rows; PyTorch computes each with
one thread, and any number of workers computes blocks side by side.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 512
# Below this many multiplications handing a block to a worker takes longer than computing it.
SMALL = 1 << 22

_WORKERS: ContextVar[Executor | None] = ContextVar("edgelm_matmul_workers", default=None)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return x [..., K] times the rows of `weight` [N, K], as [..., N]."""
    workers = _WORKERS.get()
    if workers is None or x.numel() * len(weight) < SMALL or len(weight) <= ROWS:
        return F.linear(x, weight)
    return torch.cat(list(workers.map(lambda block: _block(x, block), torch.split(weight, ROWS))), dim=-1)


@torch.no_grad()
def _block(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


@contextlib.contextmanager
def reproducible(threads: int) -> Iterator[None]:
    """Within it `linear` gives the same bits for any number of threads; without gradients.

    PyTorch's number of threads is the process's: it is 1 within, and as it was before afterwards.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, "matmul", initializer=torch.set_num_threads, initargs=(1,)) as workers:
            token = _WORKERS.set(workers)
            try:
                yield
            finally:
                _WORKERS.reset(token)
    finally:
        torch.set_num_threads(before)
