"""What a recipe's `activations` become on each kind of device, and what users are told of it.

- CPU: matrices of integers are multiplied with int8 that has a scale for every block of a row, or with float32; all
  others with float32. A scale for each token, or one calibrated for all, would be coarser than a block's and gains
  nothing here, so int8-token and int8-static become int8 in blocks; FP8 activations become float32.
- GPU, our kernels: FP8 matrices are multiplied with FP8 that has a scale for each token where the recipe asks for it;
  else all are multiplied with A (bfloat16 or float16). A calibrated scale for all tokens is coarser and saves nothing:
  the kernel that rounds a token reads it anyway. Tensor cores have no GEMM of int8 whose scales change along the
  columns. What TensorRT computes itself (`edgelm.export.tensorrt.linear`) has calibrated scales: `static_scale`.
- ONNX Runtime's CUDA provider: integers with float16 or bfloat16.
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
    """The activations that the matmuls of a device can have, by the names of its operators' attribute.

    Attributes:
        low: the low-precision type.
        high: the other; a matmul of stacked matrices has it where one of them asks for it.
        scheme: the kind of weights that can be multiplied with either.
        low_for: what of a recipe's `activations` become the low-precision type.
        others: what other weights ask for; None leaves the choice to those beside them.
    """

    low: str
    high: str
    scheme: type[AnyScheme]
    low_for: Sequence[str]
    others: str | None

    def of_matmul(self, source: WeightSource, names: Sequence[str]) -> str:
        """What these matrices, stacked, are multiplied with."""
        return self.high if self.high in self._asked(source, names).values() else self.low

    def of_experts(self, source: WeightSource, names: Sequence[str], layer: int) -> str:
        """What the experts of a layer, which are one operator, are multiplied with.

        Raises:
            ExportError: the recipe has it differently for some of them.
        """
        asked = self._asked(source, names)
        first = next(iter(asked), "")
        for name, kind in asked.items():
            if kind != asked[first]:
                raise ExportError(
                    f"the recipe has {asked[first]} activations for {first} and {kind} for {name}: the experts of "
                    f"layer {layer} are one operator here, so write one rule for all of them"
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
    """Matrices of a matmul with activations `kind` that are multiplied with int8, and in blocks of how many columns."""
    return {name: block for name in names if kind == INT8 and isinstance(source.scheme(name), Scheme)}


def static_scale(source: WeightSource, names: Sequence[str]) -> dict[str, float]:
    """The attribute `input_scale` of a matmul: the calibrated scale of its inputs, if the recipe asks for one.

    The matrices of a matmul have the same inputs, so that their scales differ by what calibration saw alone: the
    largest clips nothing that one of them saw.
    """
    if not all(source.recipe.activations_for(name) in STATIC_ACTIVATIONS for name in names):
        return {}
    scales = [scale for name in names if (scale := source.input_scale(name)) is not None]
    return {"input_scale": float(max(scales))} if len(scales) == len(names) else {}


# What a user should know whose recipe asks for activations that are others on the device.
_ON_CPU = {
    "int8-static": "int8 in blocks (float32 with FP8 weights), finer than one scale for all",
    "fp8-static": "float32 in place of FP8",
}
_ON_GPU = {
    "int8-token": "float",
    "int8-static": "float (int8-static where TensorRT computes a matmul itself)",
    "fp8-static": "fp8-token, finer than one scale for all (fp8-static where TensorRT computes a matmul itself)",
}


def notes_for_cpu(source: WeightSource) -> list[str]:
    """About static activations, where the recipe asks for them."""
    asked = source.activations().values()
    said = "; ".join(f"{kind}: {instead}" for kind, instead in _ON_CPU.items() if kind in asked)
    if not said:
        return []
    return [f"static activations are for other devices, a CPU's bundle needs no scales of them: it has {said}"]


def notes_for_cuda(source: WeightSource) -> list[str]:
    """About static activations, where the recipe asks for them."""
    note = (
        "static activations are for other devices: ONNX Runtime's CUDA provider multiplies integers with float16 or "
        "bfloat16 values, so the bundle needs no scales of them"
    )
    return [note] if source.static_inputs else []


def notes_for_gpu(source: WeightSource) -> list[str]:
    """About all that become others."""
    asked = source.activations().values()
    said = "; ".join(f"in place of {kind}: {instead}" for kind, instead in _ON_GPU.items() if kind in asked)
    return [f"a GPU's bundle multiplies, {said}"] if said else []
