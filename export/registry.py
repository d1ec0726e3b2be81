"""The targets there are: a further one is a module and an entry here."""

from __future__ import annotations

from collections.abc import Mapping

from edgelm.export.onnxruntime.target import CpuTarget, CudaTarget
from edgelm.export.options import AUTO, ExportOptions
from edgelm.export.plan import Target
from edgelm.export.tensorrt.target import TensorrtTarget, chosen_sms
from edgelm.progress import Silent

TARGETS: Mapping[str, Target] = {target.name: target for target in (CpuTarget(), CudaTarget(), TensorrtTarget())}
"""By the name that `--target` takes."""


def check_request(options: ExportOptions) -> None:
    """Refuse options that contradict each other, before anything is looked at.

    Raises:
        ExportError: saying which.
    """
    target = TARGETS[options.target]
    target.operator_set(options.ops, Silent())
    if options.dtype != AUTO:
        target.float_dtype(options.float_dtype, options.float_dtype, quantises=False)
    if options.sms is not None:
        chosen_sms(options)
