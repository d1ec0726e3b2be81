"""Map a recipe's `activations` to the activation types of each device.

- CPU: integer matrices take int8 activations with a scale per block of a row, or float32. All other matrices take
  float32. One scale per token, or one calibrated scale, is coarser than a scale per block and no faster here, so
  int8-token and int8-static become int8 in blocks; FP8 activations become float32.
- GPU, our kernels: FP8 matrices take FP8 activations with a scale per token if the recipe asks for them. All other
  matmuls take activations of type A (bfloat16 or float16). A calibrated scale for all tokens is coarser and saves
  nothing, because the kernel that rounds a token reads all of it anyway. Tensor cores have no int8 GEMM whose scales
  change along the columns. Matmuls that TensorRT computes itself (`edgelm.export.tensorrt.linear`) use the calibrated
  scale: `static_scale`.
- ONNX Runtime's CUDA provider: integer matrices with float16 or bfloat16 activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from edgelm.errors import ExportError
from edgelm.quant.recipe import AUTO, FLOAT, Recipe
from edgelm.quant.scheme import AnyScheme, Fp8Scheme, Scheme

INT8, FLOAT32, FP8 = "int8", "float32", "fp8-token"


class Quantized(Protocol):
    """Matrices with their schemes, as a recipe or a quantised checkpoint has them."""

    @property
    def recipe(self) -> Recipe:
        """The recipe."""

    def scheme(self, name: str, /) -> AnyScheme | None:
        """Return the scheme of a matrix; None where it stays float."""


@dataclass(frozen=True)
class Activations:
    """The activation types of a device's matmuls, as values of the operator attribute `activations`.

    Attributes:
        low: The low-precision type.
        high: The other type. Stacked matrices, which are one matmul, use it if one of them asks for it.
        scheme: Class of the schemes whose weights can be multiplied with either type.
        low_for: Values of a recipe's `activations` that select the low-precision type.
        others: The type that weights of other schemes ask for; None if they take the type of the matrices that they
            are stacked with.
    """

    low: str
    high: str
    scheme: type[AnyScheme]
    low_for: Sequence[str]
    others: str | None

    def of_matmul(self, source: Quantized, names: Sequence[str]) -> str:
        """Return the activation type of one matmul of these stacked matrices."""
        return self.high if self.high in self._asked(source, names).values() else self.low

    def of_experts(self, source: Quantized, names: Sequence[str], layer: int) -> str:
        """Return the activation type of a layer's experts, which are one operator.

        Raises:
            ExportError: The recipe gives experts of the layer different types.
        """
        asked = self._asked(source, names)
        first = next(iter(asked), "")
        for name, kind in asked.items():
            if kind != asked[first]:
                raise ExportError(
                    f"the recipe has {asked[first]} activations for {first} and {kind} for {name}: the experts of "
                    f"layer {layer} are one operator, so give all of them the same activations"
                )
        return asked.get(first, self.low)

    def _asked(self, source: Quantized, names: Sequence[str]) -> dict[str, str]:
        found: dict[str, str] = {}
        for name in names:
            if isinstance(source.scheme(name), self.scheme):
                found[name] = self.low if source.recipe.activations_for(name) in self.low_for else self.high
            elif self.others is not None:
                found[name] = self.others
        return found


CPU = Activations(INT8, FLOAT32, Scheme, (AUTO, "int8-token", "int8-static"), None)
GPU = Activations(FP8, FLOAT, Fp8Scheme, ("fp8-token", "fp8-static"), FLOAT)
