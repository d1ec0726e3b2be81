"""How a quantised checkpoint is stored: names, types and shapes of its tensors, and its `quantization_config`.

Recipes and calibration choose codes, scales and zero points (`QuantTensor`); a layout only says where they go.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from numpy.typing import NDArray

from edgelm.quant.recipe import Recipe
from edgelm.quant.scheme import AnyScheme
from edgelm.quant.tensor import QuantTensor

if TYPE_CHECKING:
    from edgelm.checkpoint import Checkpoint, TensorSpec
    from edgelm.models.spec import Decoder

Block = tuple[str, int, NDArray[Any]]
"""Rows of a stored tensor: its key, the first row, and the values."""


class Planned(Protocol):
    """What a layout asks of a float checkpoint with its recipe (`edgelm.quant.source.WeightSource`).

    Attributes:
        checkpoint: The checkpoint.
        recipe: How it is quantised.
        shapes: Shape of every tensor.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    shapes: Mapping[str, tuple[int, ...]]

    def scheme(self, name: str) -> AnyScheme | None:
        """Return the scheme of a tensor; None if it stays float."""


class Layout(ABC):
    """Where the parts of quantised matrices are stored.

    Attributes:
        row_unit: Matrices are written in blocks whose first row is a multiple of this.
    """

    row_unit: ClassVar[int] = 1

    def adapted(self, recipe: Recipe, decoder: Decoder) -> Recipe:
        """Return the form of a preset that this layout holds for a model; other recipes as they are."""
        del decoder
        return recipe

    @abstractmethod
    def check(self, weights: Planned) -> None:
        """Check that the layout can hold what the recipe asks for.

        Raises:
            RecipeError: It cannot; names the tensor or the key of the recipe.
        """

    @abstractmethod
    def parts(self, name: str, shape: tuple[int, int], scheme: AnyScheme) -> dict[str, TensorSpec]:
        """Return types and shapes of the stored parts of a quantised matrix `name` [N, K], by their keys."""

    @abstractmethod
    def blocks(self, name: str, shape: tuple[int, int], start: int, found: QuantTensor) -> Iterator[Block]:
        """Yield the stored values of some rows of a matrix; with `start` 0 also those that do not belong to rows.

        Args:
            name: Name of the float matrix.
            shape: (N, K) of the whole matrix.
            start: First row, a multiple of `row_unit`.
            found: The quantised rows.
        """

    @abstractmethod
    def settings(self, weights: Planned) -> dict[str, object]:
        """Return the `quantization_config` of config.json."""
