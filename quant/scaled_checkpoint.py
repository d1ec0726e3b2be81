"""A view of a float checkpoint that scales rows and columns of matrices when it reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgelm.checkpoint import Checkpoint, ShardedWriter, TensorSpec
from edgelm.checkpoint.safetensors import TensorInfo
from edgelm.checkpoint.writer import float32_to_bf16
from edgelm.checkpoint.written import CHECKPOINT
from edgelm.files import atomic_directory
from edgelm.progress import Progress, Silent
from edgelm.quant.checkpoint import SHARD_BYTES, copy_companions

if TYPE_CHECKING:
    from torch import Tensor

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Scaling:
    """Float32 factors for the rows (of a vector: the elements) and columns of a tensor; None for no factors."""

    rows: Floats | None = None
    columns: Floats | None = None

    def over_rows(self, factors: Tensor) -> Scaling:
        """Return this scaling with the rows multiplied by further factors."""
        more = factors.numpy()
        return replace(self, rows=more if self.rows is None else self.rows * more)

    def times_columns(self, factors: Tensor) -> Scaling:
        """Return this scaling with the columns multiplied by further factors."""
        more = factors.numpy()
        return replace(self, columns=more if self.columns is None else self.columns * more)

    @property
    def is_exact(self) -> bool:
        """Whether all factors are powers of two, which change only exponents."""
        return all(
            bool((np.frexp(factors)[0] == 0.5).all()) for factors in (self.rows, self.columns) if factors is not None
        )

    def apply(self, values: Floats, rows: slice | None = None) -> Floats:
        """Scale `values`, which are the given rows of the tensor; None means all rows."""
        result = values
        if self.rows is not None:
            factors = self.rows if rows is None else self.rows[rows]
            result = result * factors.reshape(-1, *(1,) * (values.ndim - 1))
        if self.columns is not None:
            result = result * self.columns
        return result


@dataclass(frozen=True)
class SmoothingChoice:
    """The choice for one fold: its producer, alpha (None for no scales), and the relative squared error around it."""

    producer: str
    alpha: float | None
    before: float
    after: float


class SmoothedCheckpoint(Checkpoint):
    """A view of a float checkpoint that reads scaled tensors: bfloat16 if that is exact, otherwise float32.

    Args:
        base: The float checkpoint.
        scaling: Factors of each scaled tensor, by name.
        choices: How the factors were chosen, in the order of layers.
    """

    def __init__(
        self, base: Checkpoint, scaling: Mapping[str, Scaling], choices: tuple[SmoothingChoice, ...] = ()
    ) -> None:
        super().__init__(base.path, base.source_id)
        self.scaling = scaling
        self.choices = choices
        self.tensors = {name: self._seen(info) for name, info in self.tensors.items()}

    def _seen(self, info: TensorInfo) -> TensorInfo:
        scaling = self.scaling.get(info.name)
        if scaling is None or (info.dtype == "BF16" and scaling.is_exact):
            return info
        return replace(info, dtype="F32", nbytes=TensorSpec("F32", info.shape).nbytes)

    def read_raw(self, name: str, rows: slice | None = None) -> NDArray[Any]:
        """See `Checkpoint.read_raw`; scaled, with the type that `tensors` states."""
        if name not in self.scaling:
            return super().read_raw(name, rows)
        values = self.read_float32(name, rows)
        return float32_to_bf16(values) if self.tensors[name].dtype == "BF16" else values

    def read_float32(self, name: str, rows: slice | None = None) -> Floats:
        """See `Checkpoint.read_float32`; scaled."""
        values = super().read_float32(name, rows)
        return self.scaling[name].apply(values, rows) if name in self.scaling else values

    def write(
        self,
        out: str | Path,
        *,
        shard_bytes: int | None = SHARD_BYTES,
        overwrite: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Write the scaled checkpoint to a folder, which appears only when it is complete.

        One tensor is in memory at a time.

        Args:
            out: Folder to write.
            shard_bytes: Largest size of a weight file; None for a single file.
            overwrite: Replace a checkpoint that EdgeLM wrote at `out`.
            progress: Gets the bytes written.

        Raises:
            EdgeLMError: `out` cannot be used (`edgelm.output_paths.check_output`), or the disk is full.
        """
        specs = {name: TensorSpec(info.dtype, info.shape) for name, info in self.tensors.items()}
        total = sum(spec.nbytes for spec in specs.values())
        with atomic_directory(out, CHECKPOINT, sources=[self.path], overwrite=overwrite) as folder:
            copy_companions(self.path, folder)
            (folder / "config.json").write_text(
                json.dumps(self.config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
            )
            with (
                ShardedWriter(folder, specs, shard_bytes) as writer,
                (progress or Silent()).task("writing", total) as advance,
            ):
                for name, spec in specs.items():
                    writer.write(name, self.read_raw(name))
                    advance(spec.nbytes)
