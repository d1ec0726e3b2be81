"""The target `tensorrt`: our own operators on NVIDIA GPUs, with compiled kernels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from edgelm.bundle import capabilities
from edgelm.bundle.capabilities import Capabilities
from edgelm.bundle.formats import gpu_float_type, gpu_kv
from edgelm.errors import DeviceError, ExportError
from edgelm.export import activations
from edgelm.export.graph.decoder import build
from edgelm.export.graph.gpu import EXACT, GpuDecoder
from edgelm.export.graph.program_builder import ProgramBuilder
from edgelm.export.options import ExportOptions
from edgelm.export.packing.weights_file import WeightsPlan
from edgelm.export.plan import WEIGHTS_FILE, BuiltGraphs, ExportJob, GraphRequest, Target
from edgelm.export.tensorrt.engines import add_engines, check_engines
from edgelm.progress import Progress
from edgelm.quant.source import WeightSource
from edgelm.runtimes.cuda.driver import find_devices
from edgelm.runtimes.cuda.kernels import nvrtc
from edgelm.runtimes.cuda.kernels.images import FOLDER, bundle_targets, compile_bundle_kernels
from edgelm.runtimes.cuda.operators import bundle_kernels
from edgelm.runtimes.cuda.program import PROGRAM_FILE


class TensorrtTarget(Target):
    """Our operators and kernels, run as TensorRT plugins or by the runtime `cuda-kernels`."""

    name = "tensorrt"

    def operator_set(self, ops: str, progress: Progress) -> str:
        """Return "gpu", the only operator set."""
        del progress
        if ops == "portable":
            raise ExportError(
                "portable operators run only with ONNX Runtime: leave --ops out, or export with --target cuda or cpu"
            )
        return "gpu"

    def float_dtype(self, asked: str, checkpoint: str, *, quantises: bool) -> str:
        """Return the type of activations and float matrices; "auto" is bfloat16 unless the checkpoint is float16."""
        del quantises
        return gpu_float_type(asked, checkpoint)

    def capabilities(self, ops: str) -> Capabilities:
        """Return the features of the GPU kernels."""
        del ops
        return capabilities.GPU

    def notes(self, source: WeightSource) -> list[str]:
        """Return a note if the recipe asks for activations that the GPU kernels replace."""
        return activations.notes_for_gpu(source)

    def check(self, options: ExportOptions) -> None:
        """Check, before hours of quantising, that NVRTC is installed and compiles for the devices."""
        for target in bundle_targets(chosen_sms(options)):
            nvrtc.load(target)
        check_engines(options.engines)

    def tools(self, options: ExportOptions) -> Mapping[str, str]:
        """Return the versions of the kernels' compiler, NVRTC."""
        libraries = (nvrtc.load(target) for target in bundle_targets(chosen_sms(options)))
        return {"nvrtc": ", ".join(sorted({library.version_text for library in libraries}))}

    def build(self, request: GraphRequest) -> BuiltGraphs:
        """Build the program and plan its weights."""
        graph, weights = ProgramBuilder(), WeightsPlan()
        kv = gpu_kv(request.source.recipe)
        model = GpuDecoder(graph, weights, request.source, request.dtype, request.info, request.decoder, kv)
        build(model, request.decoder)
        program = graph.program(EXACT)

        def finish(folder: Path, job: ExportJob) -> None:
            sms = chosen_sms(job.options)
            compile_bundle_kernels(bundle_kernels(program), sms, folder / FOLDER, job.progress)
            add_engines(folder, program, request.info, WEIGHTS_FILE, job.options.engines, sms, job.progress)

        # The debug graph is the same program with the exact attributes.
        files = {PROGRAM_FILE: program.to_json().encode()}
        return BuiltGraphs(files, PROGRAM_FILE, PROGRAM_FILE, weights, kv, finish)


def chosen_sms(options: ExportOptions) -> tuple[int, ...]:
    """Return the compute capabilities to compile for: those asked for, those of this machine's GPUs, or all supported.

    Raises:
        ExportError: `options.sms` is empty, or the kernels do not support one of them.
    """
    if options.sms is None:
        try:
            here = {10 * device.capability[0] + device.capability[1] for device in find_devices()}
        except DeviceError:
            here = set()
        return tuple(sorted(here)) or nvrtc.SMS
    wrong = [sm for sm in options.sms if sm < min(nvrtc.SMS)]
    if wrong or not options.sms:
        known = ", ".join(map(str, nvrtc.SMS))
        raise ExportError(f"--sm {','.join(map(str, wrong))}: the kernels need SM 80 or later, such as {known}")
    return options.sms
