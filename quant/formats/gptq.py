"""Read GPTQ checkpoints, as AutoGPTQ, GPTQModel and transformers write them.

The layout (AutoGPTQ's `QuantLinear.pack`; GPTQModel's `nn_modules/qlinear/__init__.py` `pack_original` and its
`docs/gptq_planar.md`) of a linear layer with N outputs and K inputs:

    qweight  int32 [K * bits / 32, N]   a bit stream along K, the first code in the lowest bits: code k of column n
                                        begins at bit k * bits. At 3 bits 32 codes take 3 words, and codes 10 and 21
                                        lie across two words
    qzeros   int32 [G, N * bits / 32]   the zero points, the same stream along N
    scales   float16 [G, N]             G = ceil(K / group_size), or 1 if group_size is -1
    g_idx    int32 [K]                  the group of each input; k // group_size unless `desc_act` reordered them

    w[n, k] = (code[k, n] - zero[g_idx[k], n]) * scales[g_idx[k], n]

Version 1 ("gptq", or no name) stores zero - 1, version 2 ("gptq_v2") stores zero (GPTQModel's `utils/model.py`,
`convert_gptq_v1_to_v2_format_module`). A version 1 field with all bits set is ambiguous and refused. Kernels that add
one (exllama, vLLM) read it as 2**bits, kernels that also mask (AutoGPTQ) as 0, and if the writer's -1 borrowed from
the next field, both are wrong.

A column of `qweight` is the same byte stream as a row of a `QuantTensor`, so repacking is a transposition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import CheckpointError
from edgelm.quant.formats import config as reading
from edgelm.quant.formats.base import (
    FLOATS,
    Bytes,
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
from edgelm.quant.primitives import unpack
from edgelm.quant.scheme import Scheme
from edgelm.quant.tensor import QuantTensor

if TYPE_CHECKING:
    from edgelm.checkpoint import Checkpoint

BITS = (3, 4, 8)
VERSIONS = {"gptq": 1, "gptq_v2": 2}
_PARTS = ("qweight", "qzeros", "scales", "g_idx", "bias")
# Flags of older files for layouts of particular kernels.
_REPACKED = ("is_marlin_format", "use_marlin", "is_bitblas_format")


@dataclass(frozen=True)
class _Layer:
    scheme: Scheme
    act_order: bool


class Gptq(Format):
    """Reads checkpoints with `quant_method: gptq`."""

    reads_whole = True

    def __init__(self, settings: Settings) -> None:
        """Read the config.

        Raises:
            UnsupportedConfigError: A field has an unsupported value.
        """
        form = reading.first_of(settings, ("checkpoint_format", "format"), "gptq")
        if form not in VERSIONS:
            raise reading.unsupported("checkpoint_format", form, " or ".join(VERSIONS))
        for key in _REPACKED:
            if settings.get(key):
                raise reading.unsupported(key, settings[key], "the plain layout")
        if settings.get("pack_dtype") not in (None, "int32"):
            raise reading.unsupported("pack_dtype", settings["pack_dtype"], "int32")
        self.version = VERSIONS[str(form)]
        self._settings = settings
        self._dynamic = reading.table(settings, "dynamic")
        self.default = _layer(settings).scheme
        self.name = f"gptq-{reading.label(self.default)}"

    def matrices(self, checkpoint: Checkpoint) -> dict[str, Matrix]:
        """Return every matrix that has a `qweight`."""
        found = {}
        skipped = reading.names(self._settings, "modules_to_not_convert")
        for key, info in checkpoint.tensors.items():
            module, _, part = key.rpartition(".")
            if part != "qweight":
                continue
            if any(skip in module for skip in skipped):
                raise reading.contradiction(module, "modules_to_not_convert")
            layer = self._layer(module)
            bits, name = layer.scheme.bits, f"{module}.weight"
            if len(info.shape) != 2 or info.shape[0] * 32 % bits:
                raise CheckpointError(
                    f"{checkpoint.path}: {key} has the shape {info.shape}, which is impossible for {bits}-bit codes: "
                    f"the config or the file is wrong, so {ADVICE}"
                )
            shape = (info.shape[1], info.shape[0] * 32 // bits)
            matrix = Matrix(name, shape, layer.scheme, parts_of(checkpoint, module, _PARTS))
            found[name] = matrix
            _check_parts(checkpoint, matrix)
            if layer.act_order:
                _check_order(checkpoint, matrix)
        refuse_orphans(checkpoint, found, ("qzeros", "scales", "g_idx"), "qweight")
        refuse_extras(checkpoint, found)
        return found

    def read(self, checkpoint: Checkpoint, matrix: Matrix, rows: slice) -> QuantTensor:
        """Return the whole matrix."""
        assert (rows.start, rows.stop) == (0, matrix.shape[0]), rows
        _check_order(checkpoint, matrix)
        codes = _columns(checkpoint.read_raw(matrix.parts["qweight"]))
        scales = np.ascontiguousarray(float32_of(checkpoint, matrix.parts["scales"]).T)
        return integer_tensor(matrix, codes, scales, self._zeros(checkpoint, matrix))

    def _zeros(self, checkpoint: Checkpoint, matrix: Matrix) -> NDArray[np.int16]:
        """Return the zero points [N, G]."""
        bits = matrix.written.bits
        packed = checkpoint.read_raw(matrix.parts["qzeros"]).astype("<i4", copy=False)
        stored = unpack(packed.view(np.uint8), bits).T.astype(np.int16)
        if self.version == 2:
            return stored
        wrapped = stored == (1 << bits) - 1
        if wrapped.any():
            row, group = (int(i) for i in np.argwhere(wrapped)[0])
            raise CheckpointError(
                f"{matrix.name}: the stored zero point of row {row}, group {group} is {(1 << bits) - 1}, which means "
                f'{1 << bits} or 0 in the format "gptq", depending on the tool. Save the checkpoint again with '
                f'checkpoint_format "gptq_v2", or {ADVICE}'
            )
        return stored + np.int16(1)

    def _layer(self, module: str) -> _Layer:
        """Return the settings of a module: the config's, overridden by the first entry of `dynamic` that matches."""
        for pattern, change in self._dynamic.items():
            if not reading.matched(pattern.removeprefix("+:").removeprefix("-:"), module):
                continue
            if pattern.startswith("-:"):
                raise reading.contradiction(module, "dynamic")
            if not isinstance(change, dict):
                raise reading.unsupported(f"dynamic[{pattern!r}]", change, "an object")
            return _layer({**self._settings, **change})
        return _layer(self._settings)


def _layer(settings: Settings) -> _Layer:
    bits = reading.bits_of(settings, ("bits",), BITS)
    group = reading.group_of(settings, ("group_size",), -1)
    scheme = Scheme(bits, group, reading.flag(settings, "sym", True))
    return _Layer(scheme, reading.flag(settings, "desc_act", False))


def _columns(words: NDArray[np.int32]) -> Bytes:
    """Transpose int32 [W, N] to bytes [N, 4 W], the lowest byte of a word first."""
    turned = np.ascontiguousarray(words.astype("<i4", copy=False).T)
    return turned.view(np.uint8)


def _check_parts(checkpoint: Checkpoint, matrix: Matrix) -> None:
    rows, columns = matrix.shape
    bits, groups = matrix.written.bits, stored_groups(matrix)
    if rows * bits % 32:
        raise CheckpointError(
            f"{checkpoint.path}: {matrix.name} has {rows} rows, whose {bits}-bit zero points do not fill whole words: "
            f"the file is damaged or padded, so {ADVICE}"
        )
    require(checkpoint, matrix, "qweight", ((columns * bits // 32, rows),), ("I32",))
    require(checkpoint, matrix, "qzeros", ((groups, rows * bits // 32),), ("I32",))
    require(checkpoint, matrix, "scales", ((groups, rows),), FLOATS)
    if "g_idx" in matrix.parts:
        require(checkpoint, matrix, "g_idx", ((columns,),), ("I32", "I64"))


def _check_order(checkpoint: Checkpoint, matrix: Matrix) -> None:
    """Refuse matrices whose groups are not neighbouring columns. Without `g_idx` they are."""
    if "g_idx" not in matrix.parts:
        return
    columns = matrix.shape[1]
    plain = np.arange(columns) // matrix.written.group_size(columns)
    found = checkpoint.read_raw(matrix.parts["g_idx"])
    if not np.array_equal(found, plain):
        first = int(np.argwhere(found != plain)[0, 0])
        raise CheckpointError(
            f"{matrix.name} was quantised in activation order: {matrix.parts['g_idx']}[{first}] is {found[first]}, but "
            f"EdgeLM needs groups of neighbouring columns ({plain[first]}). Use a checkpoint made with desc_act false "
            f"or with static groups, or {ADVICE}"
        )
