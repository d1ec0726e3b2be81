"""Matmuls whose results do not depend on the number of threads.

PyTorch splits a matmul by the number of its threads, which changes the order of the sums and so the last bits. Inside
`reproducible` every matmul is split by its shape alone, into blocks of `ROWS` weight rows. PyTorch computes each block
with one thread, and the workers compute several blocks at once.
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
# Below this number of multiplications, passing a block to a worker takes longer than computing it.
SMALL = 1 << 22

_WORKERS: ContextVar[Executor | None] = ContextVar("edgelm_matmul_workers", default=None)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return x [..., K] @ weight [N, K].T, as [..., N]."""
    workers = _WORKERS.get()
    if workers is None or x.numel() * len(weight) < SMALL or len(weight) <= ROWS:
        return F.linear(x, weight)
    return torch.cat(list(workers.map(lambda block: _block(x, block), torch.split(weight, ROWS))), dim=-1)


@torch.no_grad()
def _block(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


@contextlib.contextmanager
def reproducible(threads: int) -> Iterator[None]:
    """Context in which `linear` gives the same bits for any number of `threads`, without gradients.

    In it, PyTorch's number of threads is 1 for the whole process; afterwards it is restored.
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
