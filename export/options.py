"""What a caller of `export_bundle` can choose."""

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
    """How to export.

    Attributes:
        target: device kind, one of `TARGETS`.
        ops: operator set, one of `OPERATOR_SETS`; "auto" is native where this installation has the compiled operators
            and the target is a CPU, portable for ONNX Runtime's providers elsewhere, and our own for TensorRT.
        dtype: storage of matrices the recipe keeps in float, one of `DTYPES` ("fp32", "fp16", "bf16" are understood);
            "auto" keeps the checkpoint's. The router and the norms are always float32. On a GPU also what values are
            computed in.
        engines: for TensorRT, how engines are made.
        sms: for TensorRT, the compute capabilities to compile kernels for, such as (80, 86); None is that of the GPU
            in this machine, or without one all that there are.
        max_ram: bytes of resident memory not to exceed; None is no limit.
        threads: worker threads; None is one per core allowed to this process.
        overwrite: replace an existing bundle (it stays until the new one is complete).
        golden: the parity pack's prompts and sizes; None takes the built-in ones.
        reference: float checkpoint (folder or hub id) that a quantised one was made from, for the parity pack's float
            reference; a float checkpoint is its own.
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
        """`dtype` by its long name."""
        return _SHORT_DTYPES.get(self.dtype, self.dtype)
