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

from edgelm.errors import ExportError
from edgelm.quant.recipe import AUTO, FLOAT, STATIC_ACTIVATIONS
from edgelm.quant.scheme import AnyScheme, Fp8Scheme, Scheme
from edgelm.quant.source import WeightSource

INT8, FLOAT32, FP8 = "int8", "float32", "fp8-token"


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

    def of_matmul(self, source: WeightSource, names: Sequence[str]) -> str:
        """Return the activation type of one matmul of these stacked matrices."""
        return self.high if self.high in self._asked(source, names).values() else self.low

    def of_experts(self, source: WeightSource, names: Sequence[str], layer: int) -> str:
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

    def _asked(self, source: WeightSource, names: Sequence[str]) -> dict[str, str]:
        found: dict[str, str] = {}
        for name in names:
            if isinstance(source.scheme(name), self.scheme):
                found[name] = self.low if source.recipe.activations_for(name) in self.low_for else self.high
            elif self.others is not None:
                found[name] = self.others
        return found


CPU = Activations(INT8, FLOAT32, Scheme, (AUTO, "int8-token", "int8-static"), None)
GPU = Activations(FP8, FLOAT, Fp8Scheme, ("fp8-token", "fp8-static"), FLOAT)


def rounded(source: WeightSource, names: Sequence[str], kind: str, block: int) -> dict[str, int]:
    """Return the matrices of a matmul whose inputs are rounded to int8, each with its block size in columns."""
    return {name: block for name in names if kind == INT8 and isinstance(source.scheme(name), Scheme)}


def static_scale(source: WeightSource, names: Sequence[str]) -> dict[str, float]:
    """Return the attribute `input_scale` of a matmul if the recipe asks for static activations, otherwise nothing.

    It is the largest calibrated input scale of the stacked matrices. They have the same inputs, so their scales differ
    only by the samples that calibration saw; the largest clips none of them.
    """
    if not all(source.recipe.activations_for(name) in STATIC_ACTIVATIONS for name in names):
        return {}
    scales = [scale for name in names if (scale := source.input_scale(name)) is not None]
    return {"input_scale": float(max(scales))} if len(scales) == len(names) else {}


# Activation types of a recipe that the device replaces, with the replacement.
_ON_CPU = {
    "int8-static": "int8 in blocks (float32 with FP8 weights), finer than one scale for all",
    "fp8-static": "float32",
}
_ON_GPU = {
    "int8-token": "float",
    "int8-static": "float (int8-static where TensorRT computes a matmul itself)",
    "fp8-static": "fp8-token, finer than one scale for all (fp8-static where TensorRT computes a matmul itself)",
}


def notes_for_cpu(source: WeightSource) -> list[str]:
    """Return a note if the recipe asks for static activations, which a CPU bundle replaces."""
    asked = source.activations().values()
    said = "; ".join(f"{kind} becomes {instead}" for kind, instead in _ON_CPU.items() if kind in asked)
    if not said:
        return []
    return [f"a bundle for the CPU does not use static activations: {said}"]


def notes_for_cuda(source: WeightSource) -> list[str]:
    """Return a note if the recipe asks for static activations, which ONNX Runtime's CUDA provider does not use."""
    note = (
        "a bundle for ONNX Runtime's CUDA provider does not use static activations: integer weights are multiplied "
        "with float16 or bfloat16 activations"
    )
    return [note] if source.static_inputs else []


def notes_for_gpu(source: WeightSource) -> list[str]:
    """Return a note if the recipe asks for activations that a GPU bundle replaces."""
    asked = source.activations().values()
    said = "; ".join(f"{kind} becomes {instead}" for kind, instead in _ON_GPU.items() if kind in asked)
    return [f"a bundle for GPUs uses other activations than the recipe: {said}"] if said else []
