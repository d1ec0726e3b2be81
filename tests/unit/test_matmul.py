"""Are matmuls equal to the last bit for any number of threads, and is PyTorch's number of threads restored?"""

from __future__ import annotations

import pytest
import torch

from edgelm.reference import matmul
from edgelm.reference.matmul import ROWS, SMALL, linear, reproducible

COLUMNS = 512


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs of a matmul that is split into blocks, the last one shorter."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(5 * ROWS + 7, COLUMNS, generator=generator)
    x = torch.randn(-(-SMALL // (COLUMNS * len(weight))), 2, COLUMNS, generator=generator)
    return x, weight


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_is_a_matmul_split_by_its_shape_alone(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    x, weight = inputs()
    blocks: list[int] = []
    real = matmul._block

    def block(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        blocks.append(len(weight))
        assert torch.get_num_threads() == 1
        return real(x, weight)

    monkeypatch.setattr(matmul, "_block", block)
    with reproducible(1):
        expected = linear(x, weight)
    assert sorted(blocks) == [7, *[ROWS] * 5]
    blocks.clear()
    with reproducible(threads):
        assert torch.equal(linear(x, weight), expected)
    assert sorted(blocks) == [7, *[ROWS] * 5]
    assert torch.allclose(expected, torch.nn.functional.linear(x, weight), rtol=1e-4, atol=1e-3)


def test_is_the_number_of_pytorch_threads_restored() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with reproducible(2):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
        with pytest.raises(ZeroDivisionError), reproducible(2):
            raise ZeroDivisionError
        assert torch.get_num_threads() == 3
        assert matmul._WORKERS.get() is None
    finally:
        torch.set_num_threads(before)
