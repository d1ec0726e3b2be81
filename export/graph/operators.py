"""What a family's graph in our own operators is built with, whichever device it is for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from edgelm.bundle import ModelInfo


class OperatorDecoder(Protocol):
    """Operators that a decoder's layers are built of; each method adds one and returns its result's name."""

    info: ModelInfo

    def embedding(self, name: str) -> str:
        """The residual stream's start, `hidden.0`."""

    def linear(
        self,
        x: str,
        names: Sequence[str],
        out: str,
        layer: int | None,
        *,
        norm: str | None = None,
        residual: str = "",
        swiglu: bool = False,
    ) -> str:
        """x, normed first, times the rows of all `names`; a residual is added, or the result is silu(gate) * up."""

    def attention(
        self, qkv: str, out: str, layer: int, *, q_norm: str = "", k_norm: str = "", clip: float | None = None
    ) -> str:
        """Rotary grouped-query attention over the in-place cache."""

    def mixture(
        self, x: str, router: str, experts: Sequence[tuple[str, str, str]], out: str, layer: int, *, norm: str
    ) -> str:
        """x + mixture(RMSNorm(x)); `experts` are each one's gate, up and down."""

    def head(self, x: str, norm: str) -> None:
        """Logits of the residual stream x."""

    def hidden(self, index: int) -> str:
        """The name of the residual stream before layer `index`; the debug graph returns it."""
