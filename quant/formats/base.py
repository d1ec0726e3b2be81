"""Base of the readers of other tools' formats, and checks that reading them is exact."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from edgelm.checkpoint.safetensors import as_float32
from edgelm.errors import CheckpointError
from edgelm.quant.formats.config import ADVICE, Settings
from edgelm.quant.scheme import AnyScheme, Scheme
from edgelm.quant.tensor import QuantTensor

if TYPE_CHECKING:
    from edgelm.checkpoint import Checkpoint

Bytes = NDArray[np.uint8]

FLOATS = ("F16", "BF16", "F32")


@dataclass(frozen=True)
class Matrix:
    """A quantised matrix of another tool's checkpoint.

    Attributes:
        name: Name of the float matrix, "a.b.weight".
        shape: (N, K) of the float matrix.
        written: Scheme as stored; its group may be larger than a row.
        parts: Keys of the parts in the file, by part name; only those that exist.
        activations: Activation type that the config states, one of `recipe.ACTIVATIONS`; None if it states none.
    """

    name: str
    shape: tuple[int, int]
    written: AnyScheme
    parts: Mapping[str, str]
    activations: str | None = None

    @property
    def module(self) -> str:
        """The module's name, "a.b"."""
        return self.name.removesuffix(".weight")

    @property
    def scheme(self) -> AnyScheme:
        """The scheme of the repacked matrix: a group that does not divide the row is divided into smaller ones.

        If these would have fewer than 16 values, the group stays and the last one of each row is shorter.
        """
        return self.written.effective(self.shape[1])


class Format(ABC):
    """Reader of another tool's format, with the settings of one checkpoint's `quantization_config`.

    Attributes:
        reads_whole: Whether the values of a row are spread over the whole stored tensor, so that reading a few rows
            costs as much as reading all.
        name: Name of the derived recipe, such as "gptq-int4-g128".
        default: Scheme of the modules for which the config states no exception.
    """

    reads_whole: ClassVar[bool] = False
    name: str
    default: AnyScheme

    @abstractmethod
    def __init__(self, settings: Settings) -> None:
        """Read the checkpoint's `quantization_config`.

        Raises:
            UnsupportedConfigError: A field has an unsupported value.
        """

    @abstractmethod
    def matrices(self, checkpoint: Checkpoint) -> dict[str, Matrix]:
        """Return every quantised matrix by its float name; check types and shapes, but not values.

        Raises:
            CheckpointError: A part is missing, has another type or shape, or contradicts the config.
        """

    @abstractmethod
    def read(self, checkpoint: Checkpoint, matrix: Matrix, rows: slice) -> QuantTensor:
        """Read rows of a matrix exactly; `rows` has a start and a stop, and covers all rows if `reads_whole`.

        Raises:
            CheckpointError: A value cannot be represented exactly.
        """


def parts_of(checkpoint: Checkpoint, stem: str, parts: tuple[str, ...]) -> dict[str, str]:
    """Return the keys of a module's parts that the checkpoint has, by part name."""
    return {part: f"{stem}.{part}" for part in parts if f"{stem}.{part}" in checkpoint.tensors}


def require(
    checkpoint: Checkpoint, matrix: Matrix, part: str, shapes: tuple[tuple[int, ...], ...], dtypes: tuple[str, ...]
) -> None:
    """Check that a part exists, with one of the shapes and one of the types.

    Raises:
        CheckpointError: It does not.
    """
    key = f"{matrix.module}.{part}"
    if part not in matrix.parts:
        raise CheckpointError(
            f"{checkpoint.path} lacks {key} of the quantised {matrix.name}: fetch the checkpoint again"
        )
    info = checkpoint.tensors[key]
    if info.shape not in shapes or info.dtype not in dtypes:
        wanted = " or ".join(map(str, shapes))
        raise CheckpointError(
            f"{checkpoint.path}: {key} is {info.dtype} {info.shape}; {matrix.written.name} of {matrix.name} "
            f"{matrix.shape} needs {' or '.join(dtypes)} {wanted}: fetch the checkpoint again, or {ADVICE}"
        )


def refuse_orphans(checkpoint: Checkpoint, stems: Mapping[str, Matrix], parts: tuple[str, ...], main: str) -> None:
    """Refuse parts of quantised matrices that have no codes.

    Raises:
        CheckpointError: Names the first.
    """
    for key in checkpoint.tensors:
        stem, _, part = key.rpartition(".")
        if part in parts and f"{stem}.weight" not in stems:
            weight = checkpoint.tensors.get(f"{stem}.weight")
            if weight is not None and weight.dtype in FLOATS:
                raise CheckpointError(
                    f"{checkpoint.path} has {key}, but {stem}.weight is {weight.dtype} and not quantised: save the "
                    f"checkpoint again, compressed (llm-compressor: save_compressed=True), or {ADVICE}"
                )
            raise CheckpointError(f"{checkpoint.path} has {key} but not {stem}.{main}: fetch the checkpoint again")


_CACHE_SCALES = (
    "k_scale",
    "v_scale",
    "kv_scale",
    "q_scale",
    "prob_scale",
    "output_scale",
    "k_zero_point",
    "v_zero_point",
)


def refuse_extras(checkpoint: Checkpoint, matrices: Mapping[str, Matrix]) -> None:
    """Refuse tensors that would change the results but are not supported: KV cache scales and nonzero biases.

    AutoGPTQ wrote biases of zeros for layers without a bias. They have no effect and are ignored.

    Raises:
        CheckpointError: Names the tensor.
    """
    for key in checkpoint.tensors:
        if key.rpartition(".")[2] in _CACHE_SCALES:
            raise CheckpointError(
                f"{checkpoint.path} has {key}: static scales of the KV cache or of outputs are not supported. Use a "
                "checkpoint that was made without them"
            )
    for matrix in matrices.values():
        if "bias" in matrix.parts and checkpoint.read_raw(matrix.parts["bias"]).astype(np.bool_).any():
            raise CheckpointError(
                f"{checkpoint.path}: {matrix.parts['bias']} is not zero, but biases of quantised matrices are not "
                f"supported: {ADVICE}"
            )


def float32_of(checkpoint: Checkpoint, key: str, rows: slice | None = None) -> NDArray[np.float32]:
    """Read scales of any float type exactly.

    Raises:
        CheckpointError: A value is not finite.
    """
    return as_float32(checkpoint.read_raw(key, rows), checkpoint.tensors[key].dtype)


def integer_tensor(
    matrix: Matrix, codes: Bytes, scales: NDArray[np.float32], zeros: NDArray[Any] | None
) -> QuantTensor:
    """Make a `QuantTensor` of rows of an integer matrix.

    Args:
        matrix: The matrix.
        codes: Unsigned codes, uint8 [n, K * bits / 8], from the lowest bit up.
        scales: float32 [n, groups as stored].
        zeros: Zero points [n, groups as stored], counted like the codes; None if there are none.

    Raises:
        CheckpointError: A scale is not exact in float16, or a zero point is outside the scheme's range.
    """
    scheme = matrix.scheme
    assert isinstance(scheme, Scheme)
    with np.errstate(over="ignore"):
        half = scales.astype(np.float16)
    lost = half.astype(np.float32) != scales
    if lost.any():
        raise CheckpointError(
            f"{matrix.name}: {int(lost.sum())} of {scales.size} scales in these rows are not exact in float16 (such as "
            f"{scales[lost][0]:.9g}), the type in which EdgeLM stores them, so the weights would change: {ADVICE}"
        )
    points: Bytes | None = None
    if zeros is not None and scheme.symmetric and (zeros != scheme.symmetric_zero).any():
        raise CheckpointError(
            f"{matrix.name} has the zero point {zeros[zeros != scheme.symmetric_zero][0]}, but config.json says "
            f"symmetric, which means {scheme.symmetric_zero}: the config or the file is wrong, so {ADVICE}"
        )
    if not scheme.symmetric:
        assert zeros is not None
        outside = (zeros < 0) | (zeros >= scheme.levels)
        if outside.any():
            raise CheckpointError(
                f"{matrix.name} has the zero point {zeros[outside][0]}, outside of 0 .. {scheme.levels - 1}, the range "
                f"of {scheme.name}: {ADVICE}"
            )
        points = in_groups(zeros.astype(np.uint8), matrix)
    return QuantTensor(codes, in_groups(half, matrix), points, scheme, (codes.shape[0], matrix.shape[1]))


def in_groups(values: NDArray[Any], matrix: Matrix) -> NDArray[Any]:
    """Repeat values [n, groups as stored] for the smaller groups of `matrix.scheme`, up to the row's end."""
    stored, cut = matrix.written.group, matrix.scheme.group
    if stored is None or cut is None or stored == cut:
        return np.ascontiguousarray(values)
    return np.ascontiguousarray(np.repeat(values, stored // cut, axis=1)[:, : matrix.shape[1] // cut])


def stored_groups(matrix: Matrix) -> int:
    """Return the number of stored scales per row; the last group may end with the row."""
    return matrix.written.groups(matrix.shape[1])
