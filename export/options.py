"""Options of `export_bundle`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from edgelm.errors import ExportError
from edgelm.export.tensorrt.options import EngineOptions
from edgelm.parity.golden import GoldenOptions

TARGETS = ("cpu", "cuda", "tensorrt")
OPERATOR_SETS = ("native", "portable")
AUTO = "auto"
DTYPES = ("auto", "float32", "float16", "bfloat16")
_SHORT_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class ExportOptions:
    """Options of `export_bundle`.

    Attributes:
        target: Kind of device: "cpu", "cuda" or "tensorrt".
        ops: Operator set: "native" (ours) or "portable" (ONNX Runtime's own). "auto" chooses native on a CPU if the
            compiled operators are installed, otherwise portable; for TensorRT it is always ours.
        dtype: Type of the matrices that the recipe does not quantise: "float32", "float16" or "bfloat16" (also "fp32",
            "fp16", "bf16"). "auto" keeps the checkpoint's type. Routers and norms are float32 in any case. On a GPU,
            activations have this type too.
        sms: TensorRT only: compute capabilities to compile kernels for, such as (80, 86). None takes those of this
            machine's GPUs; without a GPU, every capability that EdgeLM supports.
        engines: TensorRT only: how to build engines.
        max_ram: Limit of resident memory in bytes; None for no limit.
        threads: Worker threads; None for one per core that this process may use.
        overwrite: Replace an existing bundle at the output path. The old one stays until the new one is complete.
        golden: Prompts and sizes of the parity pack; None for the built-in ones.
        reference: Float checkpoint (folder or hub id) that a quantised checkpoint was made from. The parity pack then
            compares with it too. Leave it out for a float checkpoint, which is its own reference.

    Raises:
        ExportError: A value is not one of those listed, or `sms` is given for another target than TensorRT.
    """

    target: str = "cpu"
    ops: str = AUTO
    dtype: str = AUTO
    sms: tuple[int, ...] | None = None
    engines: EngineOptions = field(default_factory=EngineOptions)
    max_ram: int | None = None
    threads: int | None = None
    overwrite: bool = False
    golden: GoldenOptions | None = None
    reference: str | Path | None = None

    def __post_init__(self) -> None:
        for name, valid in (("target", TARGETS), ("ops", (AUTO, *OPERATOR_SETS)), ("dtype", (*DTYPES, *_SHORT_DTYPES))):
            if getattr(self, name) not in valid:
                raise ExportError(f"{name} {getattr(self, name)!r} is not one of {', '.join(valid)}")
        if self.sms is not None and self.target != "tensorrt":
            raise ExportError(f"--sm is for --target tensorrt: bundles for {self.target} hold no compiled kernels")

    @property
    def float_dtype(self) -> str:
        """`dtype` with its long name: "float16" for "fp16"."""
        return _SHORT_DTYPES.get(self.dtype, self.dtype)
