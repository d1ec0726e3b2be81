"""The target `tensorrt`: our own operators on NVIDIA GPUs, and the kernels compiled for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from edgelm.errors import DeviceError, ExportError
from edgelm.export import activations, capabilities
from edgelm.export.capabilities import Capabilities
from edgelm.export.graph.decoder import build
from edgelm.export.graph.gpu import ACTIVATIONS, EXACT, GpuDecoder
from edgelm.export.graph.program_builder import ProgramBuilder
from edgelm.export.options import AUTO, ExportOptions
from edgelm.export.packing.weights_file import WeightsPlan
from edgelm.export.plan import WEIGHTS_FILE, BuiltGraphs, ExportJob, GraphRequest, Target
from edgelm.export.tensorrt.engines import add_engines, check_engines
from edgelm.progress import Progress
from edgelm.quant.source import WeightSource
from edgelm.runtimes.cuda.driver import find_devices
from edgelm.runtimes.cuda.kernels import nvrtc
from edgelm.runtimes.cuda.kernels.images import FOLDER, compile_bundle_kernels
from edgelm.runtimes.cuda.operators import bundle_kernels
from edgelm.runtimes.cuda.program import PROGRAM_FILE


class TensorrtTarget(Target):
    """Our operators with our kernels: as plugins of TensorRT, or launched by the runtime `cuda-kernels`."""

    name = "tensorrt"

    def operator_set(self, ops: str, progress: Progress) -> str:
        """Our own, the only one."""
        del progress
        if ops == "portable":
            raise ExportError(
                "portable operators are ONNX Runtime's: leave --ops out, or export with --target cuda or cpu for them"
            )
        return "gpu"

    def float_dtype(self, asked: str, checkpoint: str, *, quantises: bool) -> str:
        """What the activations can be, which float matrices are stored in, too: bfloat16 unless it is float16."""
        del quantises
        if asked == AUTO:
            return checkpoint if checkpoint in ACTIVATIONS else "bfloat16"
        if asked not in ACTIVATIONS:
            raise ExportError(
                f"tensor cores multiply bfloat16 or float16, not {asked}: export with --dtype bf16 or fp16, or with "
                "--target cpu"
            )
        return asked

    def capabilities(self, ops: str) -> Capabilities:
        """Those of the GPU kernels."""
        del ops
        return capabilities.GPU

    def notes(self, source: WeightSource) -> list[str]:
        """Integers are multiplied with floats, and FP8 has a scale for each token."""
        return activations.notes_for_gpu(source)

    def check(self, options: ExportOptions) -> None:
        """Look for NVRTC, and whether it knows the devices, before hours of quantising."""
        library = nvrtc.load()
        for sm in chosen_sms(options):
            library.check_target(f"sm_{sm}")
        check_engines(options.engines)

    def tools(self) -> Mapping[str, str]:
        """The kernels' compiler."""
        return {"nvrtc": nvrtc.load().version_text}

    def build(self, request: GraphRequest) -> BuiltGraphs:
        """Build the program and plan its weights."""
        graph, weights = ProgramBuilder(), WeightsPlan()
        asked = request.source.recipe.kv
        # Finer than bfloat16, and keys and values stay far from its limit of 65504.
        kv = "float16" if asked == AUTO else asked
        if kv == "float32":
            raise ExportError(
                f'recipe {request.source.recipe.name} has kv = "float32", which on a GPU only the debug graph has: '
                "leave kv out, or choose float16, int8 or fp8"
            )
        model = GpuDecoder(graph, weights, request.source, request.dtype, request.info, request.decoder, kv)
        build(model, request.decoder)
        program = graph.program(EXACT)

        def finish(folder: Path, job: ExportJob) -> None:
            sms = chosen_sms(job.options)
            compile_bundle_kernels(bundle_kernels(program), sms, folder / FOLDER, job.progress)
            add_engines(folder, program, request.info, WEIGHTS_FILE, job.options.engines, sms, job.progress)

        # The debug graph is the program's own with its exact attributes.
        files = {PROGRAM_FILE: program.to_json().encode()}
        return BuiltGraphs(files, PROGRAM_FILE, PROGRAM_FILE, weights, kv, finish)


def chosen_sms(options: ExportOptions) -> tuple[int, ...]:
    """The compute capabilities to compile for: asked for, of the GPUs here, or all that there are kernels for.

    Raises:
        ExportError: none, or one that the kernels do not run on.
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
        raise ExportError(f"--sm {','.join(map(str, wrong))}: the kernels run from SM 80 on, such as {known}")
    return options.sms
