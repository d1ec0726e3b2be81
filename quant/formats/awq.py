"""Read AWQ checkpoints, version "gemm", as AutoAWQ and transformers write them.

The layout (AutoAWQ's `modules/linear/gemm.py`, `WQLinear_GEMM.from_linear`, and `utils/packing_utils.py`) of a
linear layer with N outputs and K inputs:

    qweight  int32 [K, N / 8]   nibble i of word c, from the lowest, is the code of output 8 c + (0 2 4 6 1 3 5 7)[i]
    qzeros   int32 [G, N / 8]   the zero points in the same order, not decremented
    scales   float16 [G, N]

    w[n, k] = (code[k, n] - zero[k // group_size, n]) * scales[k // group_size, n]
"""

from __future__ import annotations

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
from edgelm.quant.scheme import Scheme
from edgelm.quant.tensor import QuantTensor

if TYPE_CHECKING:
    from edgelm.checkpoint import Checkpoint

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output, of eight neighbours, that each nibble of a word holds, from the lowest nibble."""

_PARTS = ("qweight", "qzeros", "scales", "bias")


class Awq(Format):
    """Reads checkpoints with `quant_method: awq` and `version: gemm`."""

    reads_whole = True

    def __init__(self, settings: Settings) -> None:
        """Read the config.

        Raises:
            UnsupportedConfigError: A field has an unsupported value.
        """
        version = reading.first_of(settings, ("version", "checkpoint_format", "format"), "gemm")
        if not isinstance(version, str) or version.lower() != "gemm":
            raise reading.unsupported("version", version, '"gemm"')
        bits = reading.bits_of(settings, ("bits", "w_bit"), (4,), 4)
        group = reading.group_of(settings, ("group_size", "q_group_size"), 128)
        self.default = Scheme(bits, group, not reading.flag(settings, "zero_point", True))
        self.name = f"awq-{reading.label(self.default)}"
        self._skipped = reading.names(settings, "modules_to_not_convert")

    def matrices(self, checkpoint: Checkpoint) -> dict[str, Matrix]:
        """Return every matrix that has a `qweight`."""
        found = {}
        for key, info in checkpoint.tensors.items():
            module, _, part = key.rpartition(".")
            if part != "qweight":
                continue
            if any(skip in module for skip in self._skipped):
                raise reading.contradiction(module, "modules_to_not_convert")
            if len(info.shape) != 2:
                raise CheckpointError(
                    f"{checkpoint.path}: {key} has the shape {info.shape}, but must be a matrix: {ADVICE}"
                )
            columns, rows = info.shape[0], info.shape[1] * 8
            name = f"{module}.weight"
            matrix = Matrix(name, (rows, columns), self.default, parts_of(checkpoint, module, _PARTS))
            found[name] = matrix
            groups = stored_groups(matrix)
            require(checkpoint, matrix, "qweight", ((columns, rows // 8),), ("I32",))
            require(checkpoint, matrix, "qzeros", ((groups, rows // 8),), ("I32",))
            require(checkpoint, matrix, "scales", ((groups, rows),), FLOATS)
        refuse_orphans(checkpoint, found, ("qzeros", "scales"), "qweight")
        refuse_extras(checkpoint, found)
        return found

    def read(self, checkpoint: Checkpoint, matrix: Matrix, rows: slice) -> QuantTensor:
        """Return the whole matrix."""
        assert (rows.start, rows.stop) == (0, matrix.shape[0]), rows
        words = np.ascontiguousarray(_words(checkpoint, matrix.parts["qweight"]).T)  # [N / 8, K]
        codes = np.empty((matrix.shape[0], matrix.shape[1] // 2), np.uint8)
        for nibble, output in enumerate(ORDER):
            values = _nibble(words, nibble)
            codes[output::8] = values[:, 0::2] | values[:, 1::2] << np.uint8(4)
        stored = _words(checkpoint, matrix.parts["qzeros"])
        zeros = np.empty((matrix.shape[0], stored.shape[0]), np.uint8)
        for nibble, output in enumerate(ORDER):
            zeros[output::8] = _nibble(stored, nibble).T
        scales = np.ascontiguousarray(float32_of(checkpoint, matrix.parts["scales"]).T)
        return integer_tensor(matrix, codes, scales, zeros)


def _words(checkpoint: Checkpoint, key: str) -> NDArray[np.uint32]:
    return checkpoint.read_raw(key).view(np.uint32)


def _nibble(words: NDArray[np.uint32], place: int) -> Bytes:
    return (words >> np.uint32(4 * place) & np.uint32(15)).astype(np.uint8)
