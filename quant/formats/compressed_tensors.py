"""Read compressed-tensors checkpoints, the format of llm-compressor and vLLM.

The layouts (compressed-tensors' `compressors/quantized_compressors/{pack_quantized,naive_quantized}.py`, and
`quantization/lifecycle/forward.py`, `dequantize`) of a linear layer with N outputs and K inputs, by the `format` of
the config or of a group:

    pack-quantized      weight_packed int32 [N, K * bits / 32]: code q as q + 2**(bits - 1), from the lowest bits up
                        weight_shape int [2]: N, K
                        weight_zero_point (symmetric: none) int32 [N * bits / 32, G], packed along N; or int8 [N, G]
    int-quantized       weight int8 [N, K], signed codes; weight_zero_point (symmetric: none) int8, shaped as the scales
    float-quantized     weight float8_e4m3fn [N, K]
    naive-quantized     like one of the last two, by the type of `weight`
    all                 weight_scale of any float type: [1] (strategy tensor), [N, 1] (channel), [N, G] (group), or
                        [ceil(N / r), ceil(K / c)] (block, with block_structure [r, c])
                        input_scale [1], if activations are static; weight_g_idx, if inputs were reordered

    w[n, k] = (q[n, k] - zero[n, k // group]) * weight_scale[n, k // group]

A module belongs to the first group of `config_groups` whose `targets` name it. "Linear" names every module, "re:..." is
a regular expression from the start of the name, anything else is a full name (`utils/match.py`). The values read here
are exact; compressed-tensors itself rounds them to the scales' type when it decompresses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import CheckpointError
from edgelm.quant.formats import config as reading
from edgelm.quant.formats.base import (
    FLOATS,
    Format,
    Matrix,
    float32_of,
    integer_tensor,
    parts_of,
    refuse_extras,
    refuse_orphans,
    require,
    stored_groups,
)
from edgelm.quant.formats.config import ADVICE, Settings
from edgelm.quant.formats.floats import E4M3, check_scales, read_fp8, scale_rows
from edgelm.quant.primitives import unpack
from edgelm.quant.scheme import AnyScheme, Fp8Scheme, Scheme
from edgelm.quant.tensor import QuantTensor

if TYPE_CHECKING:
    from edgelm.checkpoint import Checkpoint

FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
_PARTS = (
    "weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "input_scale",
    "input_zero_point", "bias",
)  # fmt: skip
# Stages of llm-compressor. They do not say how the weights are stored: some compressed ones are "frozen". Float weights
# that are not rounded yet have scales beside them, which `refuse_orphans` finds.
_STATUSES = ("initialized", "calibration", "frozen", "compressed")
_STRATEGIES = ("tensor", "channel", "group", "block")
_EVERY_LINEAR = "Linear"


@dataclass(frozen=True)
class _Group:
    """One entry of `config_groups`."""

    targets: tuple[str, ...]
    scheme: AnyScheme
    packed: bool
    block_rows: int | None
    activations: str | None


class CompressedTensors(Format):
    """Reads checkpoints with `quant_method: compressed-tensors`."""

    def __init__(self, settings: Settings) -> None:
        """Read the config.

        Raises:
            UnsupportedConfigError: A field has an unsupported value.
        """
        _check_whole(settings)
        groups = reading.table(settings, "config_groups")
        if not groups:
            raise reading.unsupported("config_groups", settings.get("config_groups"), "at least one group")
        self._groups = tuple(_group(key, reading.table(groups, key), settings.get("format")) for key in groups)
        self._ignored = reading.names(settings, "ignore")
        self.default = self._groups[0].scheme
        self.name = f"compressed-tensors-{reading.label(self.default)}"

    def matrices(self, checkpoint: Checkpoint) -> dict[str, Matrix]:
        """Return every matrix with packed codes, or with a weight of type int8 or FP8."""
        found = {}
        for key, info in checkpoint.tensors.items():
            module, _, part = key.rpartition(".")
            packed = part == "weight_packed"
            if not packed and not (part == "weight" and info.dtype in ("I8", E4M3)):
                continue
            group = self._group_of(checkpoint, module)
            if packed != group.packed or (not packed and (info.dtype == E4M3) != isinstance(group.scheme, Fp8Scheme)):
                raise CheckpointError(
                    f"{checkpoint.path}: {key} is {info.dtype}, which does not agree with {group.scheme.name} in "
                    f"config.json: the config or the file is wrong, so {ADVICE}"
                )
            parts = parts_of(checkpoint, module, _PARTS)
            if packed and "weight" in parts:
                raise CheckpointError(
                    f"{checkpoint.path} has both {key} and {module}.weight: fetch the checkpoint again, or {ADVICE}"
                )
            shape = _unpacked_shape(checkpoint, module, parts, group) if packed else info.shape
            if len(shape) != 2:
                raise CheckpointError(f"{checkpoint.path}: {key} has the shape {shape}, but must be a matrix: {ADVICE}")
            name = f"{module}.weight"
            found[name] = Matrix(name, (shape[0], shape[1]), group.scheme, parts, group.activations)
            _check_parts(checkpoint, found[name], group)
        orphans = tuple(part for part in _PARTS if part not in ("weight", "bias"))
        refuse_orphans(checkpoint, found, orphans, "weight_packed, nor a quantised weight beside it")
        refuse_extras(checkpoint, found)
        return found

    def read(self, checkpoint: Checkpoint, matrix: Matrix, rows: slice) -> QuantTensor:
        """Return rows of a matrix."""
        group = self._group_of(checkpoint, matrix.module)
        if isinstance(group.scheme, Fp8Scheme):
            return read_fp8(checkpoint, matrix, "weight_scale", rows, group.block_rows or 1)
        _check_order(checkpoint, matrix)
        if group.packed:
            words = checkpoint.read_raw(matrix.parts["weight_packed"], rows).astype("<i4", copy=False)
            codes = words.view(np.uint8)
        else:
            # Flipping the sign bit of a two's complement number adds 128.
            codes = checkpoint.read_raw(matrix.parts["weight"], rows).view(np.uint8) ^ np.uint8(0x80)
        key = matrix.parts["weight_scale"]
        return integer_tensor(
            matrix,
            codes,
            _by_row(float32_of(checkpoint, key, scale_rows(checkpoint, key, rows)), rows),
            _zeros(checkpoint, matrix, rows),
        )

    def _group_of(self, checkpoint: Checkpoint, module: str) -> _Group:
        if any(_names(entry, module) for entry in self._ignored):
            raise reading.contradiction(module, "ignore")
        for group in self._groups:
            if any(target == _EVERY_LINEAR or _names(target, module) for target in group.targets):
                return group
        raise CheckpointError(
            f"{checkpoint.path} holds {module} quantised, but no group in quantization_config.config_groups of "
            f"config.json names it: fetch the checkpoint again, or {ADVICE}"
        )


def _names(entry: str, module: str) -> bool:
    return reading.matched(entry.removeprefix("re:"), module) if entry.startswith("re:") else entry == module


def _check_whole(settings: Settings) -> None:
    """Refuse unsupported settings of the whole checkpoint."""
    status = settings.get("quantization_status")
    if status is not None and status not in _STATUSES:
        raise reading.unsupported("quantization_status", status, ", ".join(_STATUSES))
    for key, accepted in (("kv_cache_scheme", "no scales of the KV cache"), ("transform_config", "no transforms")):
        if settings.get(key):
            raise reading.unsupported(key, settings[key], accepted)
    sparsity = reading.table(settings, "sparsity_config")
    if sparsity and sparsity.get("format") != "dense":
        raise reading.unsupported("sparsity_config.format", sparsity.get("format"), '"dense"')


def _group(key: str, entry: Settings, whole_format: object) -> _Group:
    where = f"config_groups.{key}"
    form = reading.first_of(entry, ("format",), whole_format)
    if form not in FORMATS:
        raise reading.unsupported(f"{where}.format", form, ", ".join(FORMATS))
    if entry.get("output_activations"):
        raise reading.unsupported(f"{where}.output_activations", entry["output_activations"], "none")
    weights = reading.table(entry, "weights")
    scheme, block_rows = _scheme(f"{where}.weights", weights)
    is_float = isinstance(scheme, Fp8Scheme)
    if (form == "float-quantized") != is_float and form != "naive-quantized":
        raise reading.unsupported(f"{where}.weights.type", weights.get("type"), f"what the format {form} stores")
    if form in ("int-quantized", "naive-quantized") and scheme.bits != 8:
        raise reading.unsupported(f"{where}.weights.num_bits", scheme.bits, f"8 with the format {form}")
    activations = _activations(where, reading.table(entry, "input_activations"))
    return _Group(reading.names(entry, "targets"), scheme, form == "pack-quantized", block_rows, activations)


def _scheme(where: str, weights: Settings) -> tuple[AnyScheme, int | None]:
    """Return the scheme of a group, and the rows that share a scale if scales are per block."""
    kind, strategy = weights.get("type", "int"), weights.get("strategy")
    if kind not in ("int", "float"):
        raise reading.unsupported(f"{where}.type", kind, '"int" or "float"')
    strategy = strategy or ("group" if weights.get("group_size") not in (None, -1) else "tensor")
    if strategy not in _STRATEGIES:
        raise reading.unsupported(f"{where}.strategy", strategy, ", ".join(_STRATEGIES))
    if weights.get("dynamic"):
        raise reading.unsupported(f"{where}.dynamic", weights["dynamic"], "false")
    bits = reading.bits_of(weights, ("num_bits",), (8,) if kind == "float" else (4, 8), 8)
    symmetric = reading.flag(weights, "symmetric", True)
    group, block_rows = None, None
    if strategy == "group":
        group = reading.group_of(weights, ("group_size",))
    if strategy == "block":
        block = weights.get("block_structure")
        if kind != "float" or not isinstance(block, list) or len(block) != 2 or not isinstance(block[0], int):
            raise reading.unsupported(f"{where}.block_structure", block, "two numbers, for weights of FP8")
        block_rows, group = block[0], reading.group_of({"block_structure": block[1]}, ("block_structure",))
    if kind == "float":
        if not symmetric:
            raise reading.unsupported(f"{where}.symmetric", False, "true for weights of FP8")
        return Fp8Scheme(group), block_rows
    return Scheme(bits, group, symmetric), None


def _activations(where: str, inputs: Settings) -> str | None:
    """Return the activation type; None if it is float, or rounded at run time in a way that recipes do not have."""
    if not inputs:
        return None
    kind = "fp8" if inputs.get("type") == "float" else "int8"
    if inputs.get("dynamic"):
        plain = inputs.get("strategy") == "token" and inputs.get("num_bits") == 8 and inputs.get("symmetric", True)
        return f"{kind}-token" if plain else None
    if inputs.get("num_bits", 8) != 8 or inputs.get("strategy") not in (None, "tensor"):
        raise reading.unsupported(f"{where}.input_activations", dict(inputs), "static scales of 8 bits per tensor")
    if not reading.flag(inputs, "symmetric", True):
        raise reading.unsupported(f"{where}.input_activations.symmetric", False, "true where the scale is static")
    return f"{kind}-static"


def _unpacked_shape(checkpoint: Checkpoint, module: str, parts: dict[str, str], group: _Group) -> tuple[int, ...]:
    """Return (N, K) from `weight_shape`."""
    if "weight_shape" not in parts:
        raise CheckpointError(f"{checkpoint.path} lacks {module}.weight_shape: fetch the checkpoint again")
    shape = tuple(int(size) for size in checkpoint.read_raw(parts["weight_shape"]).reshape(-1))
    per_word = 32 // group.scheme.bits
    if len(shape) == 2 and shape[1] % per_word:
        raise CheckpointError(
            f"{checkpoint.path}: {module} has rows of {shape[1]} values, not a multiple of {per_word}, and padded rows "
            f"are not supported: {ADVICE}"
        )
    return shape


def _check_parts(checkpoint: Checkpoint, matrix: Matrix, group: _Group) -> None:
    rows, columns = matrix.shape
    bits, groups = matrix.written.bits, stored_groups(matrix)
    if group.packed:
        require(checkpoint, matrix, "weight_packed", ((rows, columns * bits // 32),), ("I32",))
    check_scales(checkpoint, matrix, "weight_scale", group.block_rows)
    scheme = matrix.written
    if isinstance(scheme, Scheme) and (not scheme.symmetric or "weight_zero_point" in matrix.parts):
        shapes: Sequence[tuple[int, ...]] = (
            ((rows, groups), (1,), (1, 1), (rows,)) if groups == 1 else ((rows, groups),)
        )
        if group.packed:
            shapes = (*shapes, (-(-rows * bits // 32), groups))
        require(checkpoint, matrix, "weight_zero_point", tuple(shapes), ("I32", "I8") if group.packed else ("I8",))
    if "input_scale" in matrix.parts or (group.activations or "").endswith("-static"):
        require(checkpoint, matrix, "input_scale", ((), (1,), (1, 1)), FLOATS)
    if "input_zero_point" in matrix.parts and checkpoint.read_raw(matrix.parts["input_zero_point"]).astype(bool).any():
        raise CheckpointError(
            f"{checkpoint.path}: {matrix.parts['input_zero_point']} is not zero, but only symmetric static activations "
            f"are supported: {ADVICE}"
        )


def _by_row(values: NDArray[np.float32], rows: slice) -> NDArray[np.float32]:
    """Expand scales (one for all, one per row, or one per group of a row) to [n, groups]."""
    count = rows.stop - rows.start
    values = values.reshape(len(values), -1) if values.ndim else values.reshape(1, 1)
    return np.repeat(values, count, axis=0) if len(values) == 1 and count > 1 else values


def _zeros(checkpoint: Checkpoint, matrix: Matrix, rows: slice) -> NDArray[Any] | None:
    """Return the zero points [n, groups], shifted like the codes; None if there are none."""
    if "weight_zero_point" not in matrix.parts:
        return None
    key, bits = matrix.parts["weight_zero_point"], matrix.written.bits
    info = checkpoint.tensors[key]
    middle = np.int16(1 << (bits - 1))
    if info.dtype == "I8":
        signed = checkpoint.read_raw(key, scale_rows(checkpoint, key, rows)).astype(np.int16)
        signed = signed.reshape(len(signed), -1)
        return (np.repeat(signed, rows.stop - rows.start, axis=0) if info.shape in ((1,), (1, 1)) else signed) + middle
    per_word = 32 // bits
    words = slice(rows.start // per_word, -(-rows.stop // per_word))
    packed = np.ascontiguousarray(checkpoint.read_raw(key, words).astype("<i4", copy=False).T)
    first = rows.start - words.start * per_word
    return unpack(packed.view(np.uint8), bits).T[first : first + rows.stop - rows.start].astype(np.int16)


def _check_order(checkpoint: Checkpoint, matrix: Matrix) -> None:
    if "weight_g_idx" not in matrix.parts:
        return
    columns = matrix.shape[1]
    found = checkpoint.read_raw(matrix.parts["weight_g_idx"]).reshape(-1)
    # -1 means not reordered.
    if not (found == -1).all() and not np.array_equal(found, np.arange(columns) // matrix.written.group_size(columns)):
        raise CheckpointError(
            f"{matrix.name} was quantised in activation order ({matrix.parts['weight_g_idx']}), so its groups are not "
            f'neighbouring columns, which EdgeLM needs: use a checkpoint made with actorder "weight" or none, or '
            f"{ADVICE}"
        )
