"""What follows from the activations of a recipe (`edgelm.bundle.activations`) for attributes and notes of an export."""

from __future__ import annotations

from collections.abc import Sequence

from edgelm.bundle.activations import INT8
from edgelm.quant.recipe import STATIC_ACTIVATIONS
from edgelm.quant.scheme import Scheme
from edgelm.quant.source import WeightSource


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
