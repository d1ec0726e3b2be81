"""Read FP8 checkpoints with `quant_method: fp8`, from DeepSeek, AutoFP8, vLLM and transformers' fine-grained FP8.

weight             float8_e4m3fn [N, K]
weight_scale_inv   float32 [ceil(N / 128), ceil(K / 128)] if the config has weight_block_size [128, 128]. Despite
                   its name it is a factor (DeepSeek-V3's inference/kernel.py, weight_dequant_kernel)
weight_scale       without blocks: one per matrix, or one per row
input_scale        one per matrix, with activation_scheme "static": x = value(code) * input_scale

w[n, k] = value(weight[n, k]) * scale[n // 128, k // 128]
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgelm.errors import CheckpointError
from edgelm.quant.formats import config as reading
from edgelm.quant.formats.base import FLOATS, Format, Matrix, parts_of, refuse_extras, refuse_orphans, require
from edgelm.quant.formats.config import ADVICE, Settings
from edgelm.quant.formats.floats import E4M3, check_scales, read_fp8
from edgelm.quant.scheme import Fp8Scheme
from edgelm.quant.tensor import QuantTensor

if TYPE_CHECKING:
    from edgelm.checkpoint import Checkpoint

_PARTS = ("weight", "weight_scale_inv", "weight_scale", "input_scale", "bias")
_SCALES = ("weight_scale_inv", "weight_scale")
_SKIPS = ("modules_to_not_convert", "ignored_layers")


class Fp8(Format):
    """Reads checkpoints with `quant_method: fp8`."""

    def __init__(self, settings: Settings) -> None:
        """Read the config.

        Raises:
            UnsupportedConfigError: A field has an unsupported value.
        """
        if settings.get("fmt") not in (None, "e4m3", "float8_e4m3fn"):
            raise reading.unsupported("fmt", settings["fmt"], '"e4m3"')
        scheme = settings.get("activation_scheme", "dynamic")
        if scheme not in ("dynamic", "static"):
            raise reading.unsupported("activation_scheme", scheme, '"dynamic" or "static"')
        self._static = scheme == "static"
        self._block_rows, group = _block(settings)
        self.default = Fp8Scheme(group)
        self.name = f"fp8-{self.default.name.removeprefix('fp8-')}-stored"
        self._skipped = (*reading.names(settings, _SKIPS[0]), *reading.names(settings, _SKIPS[1]))

    def matrices(self, checkpoint: Checkpoint) -> dict[str, Matrix]:
        """Return every FP8 matrix."""
        found = {}
        scale = _SCALES[0] if self._block_rows else _SCALES[1]
        for key, info in checkpoint.tensors.items():
            if info.dtype != E4M3:
                continue
            module = key.removesuffix(".weight")
            if len(info.shape) != 2 or module == key:
                raise CheckpointError(
                    f"{checkpoint.path}: {key} is {E4M3} of shape {info.shape}, but not a weight matrix: {ADVICE}"
                )
            # vLLM and transformers compare these lists with full names and with names of parent modules.
            if any(skip == module or f".{skip}." in f".{module}." for skip in self._skipped):
                raise reading.contradiction(module, " or ".join(_SKIPS))
            parts = parts_of(checkpoint, module, _PARTS)
            activations = "fp8-static" if self._static else None
            matrix = Matrix(key, (info.shape[0], info.shape[1]), self.default, parts, activations)
            found[key] = matrix
            check_scales(checkpoint, matrix, scale, self._block_rows)
            if self._static:
                require(checkpoint, matrix, "input_scale", ((), (1,)), FLOATS)
        refuse_orphans(checkpoint, found, (*_SCALES, "input_scale"), f"weight of type {E4M3}")
        refuse_extras(checkpoint, found)
        return found

    def read(self, checkpoint: Checkpoint, matrix: Matrix, rows: slice) -> QuantTensor:
        """Return rows of a matrix."""
        if self._block_rows:
            return read_fp8(checkpoint, matrix, _SCALES[0], rows, self._block_rows)
        return read_fp8(checkpoint, matrix, _SCALES[1], rows)


def _block(settings: Settings) -> tuple[int | None, int | None]:
    """Return the rows and columns that share a scale; None and None without blocks."""
    block = settings.get("weight_block_size")
    if block is None:
        return None, None
    if not isinstance(block, list) or len(block) != 2 or not isinstance(block[0], int) or block[0] < 1:
        raise reading.unsupported("weight_block_size", block, "two numbers such as [128, 128], or none")
    return block[0], reading.group_of({"weight_block_size": block[1]}, ("weight_block_size",))
