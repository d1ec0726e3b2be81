"""What every other format is turned into, and the checks that turning it rounds nothing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from edgelm.checkpoint.safetensors import as_float32
from edgelm.errors import CheckpointError
from edgelm.quant.formats.config import WAY_OUT, Settings
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
        name: of the float matrix, "a.b.weight".
        shape: (N, K) of the float matrix.
        written: the scheme as the format has it, its group perhaps wider than a row.
        parts: key in the file by the part's own name, those of them that are there.
        activations: what the matrix multiplies where the config says so, as recipes name it; None leaves it open.
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
        """The scheme of the repacked matrix: a group that does not divide the row is cut into smaller equal ones.

        Where these would be of fewer than 16 values it stays, and the last one of a row is shorter.
        """
        return self.written.effective(self.shape[1])


class Format(ABC):
    """Another tool's format, as one checkpoint's `quantization_config` sets it.

    Attributes:
        reads_whole: whether a row is spread over the whole stored tensor, so that reading a few rows costs as much as
            reading all of them.
        name: of the recipe that is derived, such as "gptq-int4-g128".
        default: the scheme of what the config does not except.
    """

    reads_whole: ClassVar[bool] = False
    name: str
    default: AnyScheme

    @abstractmethod
    def __init__(self, settings: Settings) -> None:
        """Read the checkpoint's `quantization_config`.

        Raises:
            UnsupportedConfigError: a field is set to what is not read.
        """

    @abstractmethod
    def matrices(self, checkpoint: Checkpoint) -> dict[str, Matrix]:
        """Return every quantised matrix by its float name; checks headers, not values.

        Raises:
            CheckpointError: a part is missing, of another type or shape, or contradicts the config.
        """

    @abstractmethod
    def read(self, checkpoint: Checkpoint, matrix: Matrix, rows: slice) -> QuantTensor:
        """Return rows of a matrix, exactly; `rows` has a start and a stop, and is all of them where `reads_whole`.

        Raises:
            CheckpointError: a value has no exact counterpart.
        """


def parts_of(checkpoint: Checkpoint, stem: str, parts: tuple[str, ...]) -> dict[str, str]:
    """Return the keys of those parts of a module that the checkpoint has."""
    return {part: f"{stem}.{part}" for part in parts if f"{stem}.{part}" in checkpoint.tensors}


def require(
    checkpoint: Checkpoint, matrix: Matrix, part: str, shapes: tuple[tuple[int, ...], ...], dtypes: tuple[str, ...]
) -> None:
    """Check that a part is there, in one of the shapes and types.

    Raises:
        CheckpointError: it is not.
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
            f"{matrix.shape} needs {' or '.join(dtypes)} {wanted}: fetch the checkpoint again, or {WAY_OUT}"
        )


def refuse_orphans(checkpoint: Checkpoint, stems: Mapping[str, Matrix], parts: tuple[str, ...], main: str) -> None:
    """Refuse parts of quantised matrices whose codes are not there.

    Raises:
        CheckpointError: naming the first.
    """
    for key in checkpoint.tensors:
        stem, _, part = key.rpartition(".")
        if part in parts and f"{stem}.weight" not in stems:
            weight = checkpoint.tensors.get(f"{stem}.weight")
            if weight is not None and weight.dtype in FLOATS:
                raise CheckpointError(
                    f"{checkpoint.path} has {key}, but {stem}.weight is {weight.dtype} and not rounded to it yet: the "
                    "checkpoint was saved without being compressed (llm-compressor: save_compressed=True); save it "
                    f"again, or {WAY_OUT}"
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
    """Refuse what changes the results and has no place here: scales of the KV cache, and biases that are not zero.

    AutoGPTQ wrote biases of zeros for layers that have none; adding them is nothing, so they are passed over.

    Raises:
        CheckpointError: naming the tensor.
    """
    for key in checkpoint.tensors:
        if key.rpartition(".")[2] in _CACHE_SCALES:
            raise CheckpointError(
                f"{checkpoint.path} has {key}: static scales of the KV cache (or of outputs) are not supported; "
                "take a checkpoint that was made without them"
            )
    for matrix in matrices.values():
        if "bias" in matrix.parts and checkpoint.read_raw(matrix.parts["bias"]).astype(np.bool_).any():
            raise CheckpointError(
                f"{checkpoint.path}: {matrix.parts['bias']} is not zero: these models have no biases, and adding one "
                f"is not implemented; {WAY_OUT}"
            )


def float32_of(checkpoint: Checkpoint, key: str, rows: slice | None = None) -> NDArray[np.float32]:
    """Read a scale of any float type, exactly.

    Raises:
        CheckpointError: a value is not finite.
    """
    return as_float32(checkpoint.read_raw(key, rows), checkpoint.tensors[key].dtype)


def integer_tensor(
    matrix: Matrix, codes: Bytes, scales: NDArray[np.float32], zeros: NDArray[Any] | None
) -> QuantTensor:
    """Put rows together as EdgeLM has them.

    Args:
        matrix: whose rows these are.
        codes: uint8 [n, K * bits / 8], unsigned codes from the lowest bit up.
        scales: float32 [n, groups as stored].
        zeros: [n, groups as stored] in the codes' own numbers; None for none, else checked against the scheme.

    Raises:
        CheckpointError: a scale is no float16 number, or a zero point does not fit.
    """
    scheme = matrix.scheme
    assert isinstance(scheme, Scheme)
    with np.errstate(over="ignore"):
        half = scales.astype(np.float16)
    lost = half.astype(np.float32) != scales
    if lost.any():
        raise CheckpointError(
            f"{matrix.name}: {int(lost.sum())} of {scales.size} scales in these rows are no float16 numbers "
            f"(e.g. {scales[lost][0]:.9g}), in which EdgeLM stores scales of integers: rounding them would change the "
            f"weights; {WAY_OUT}"
        )
    points: Bytes | None = None
    if zeros is not None and scheme.symmetric and (zeros != scheme.symmetric_zero).any():
        raise CheckpointError(
            f"{matrix.name} has the zero point {zeros[zeros != scheme.symmetric_zero][0]}, but config.json calls it "
            f"symmetric, which is {scheme.symmetric_zero} always: the config or the file is wrong; {WAY_OUT}"
        )
    if not scheme.symmetric:
        assert zeros is not None
        outside = (zeros < 0) | (zeros >= scheme.levels)
        if outside.any():
            raise CheckpointError(
                f"{matrix.name} has the zero point {zeros[outside][0]}, outside of 0 .. {scheme.levels - 1}: "
                f"{scheme.name} cannot hold it; {WAY_OUT}"
            )
        points = in_groups(zeros.astype(np.uint8), matrix)
    return QuantTensor(codes, in_groups(half, matrix), points, scheme, (codes.shape[0], matrix.shape[1]))


def in_groups(values: NDArray[Any], matrix: Matrix) -> NDArray[Any]:
    """Repeat [n, groups as stored] over the smaller groups of `matrix.scheme`, whose last one ends with the row."""
    stored, cut = matrix.written.group, matrix.scheme.group
    if stored is None or cut is None or stored == cut:
        return np.ascontiguousarray(values)
    return np.ascontiguousarray(np.repeat(values, stored // cut, axis=1)[:, : matrix.shape[1] // cut])


def stored_groups(matrix: Matrix) -> int:
    """Scales to a row as the format has them: the last group may be cut off by the row's end."""
    return matrix.written.groups(matrix.shape[1])
