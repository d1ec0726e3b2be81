"""Registry of the export targets. A new target is one module and one entry here."""

from __future__ import annotations

from collections.abc import Mapping

from edgelm.export.onnxruntime.target import CpuTarget, CudaTarget
from edgelm.export.options import AUTO, ExportOptions
from edgelm.export.plan import Target
from edgelm.export.tensorrt.target import TensorrtTarget, chosen_sms
from edgelm.progress import Silent

TARGETS: Mapping[str, Target] = {target.name: target for target in (CpuTarget(), CudaTarget(), TensorrtTarget())}
"""The targets by their `--target` name."""


def check_request(options: ExportOptions) -> None:
    """Refuse options that contradict each other, before the checkpoint is read.

    Raises:
        ExportError: The target does not have the operator set, the dtype or the compute capabilities asked for.
    """
    target = TARGETS[options.target]
    target.operator_set(options.ops, Silent())
    if options.dtype != AUTO:
        target.float_dtype(options.float_dtype, options.float_dtype, quantises=False)
    if options.sms is not None:
        chosen_sms(options)
