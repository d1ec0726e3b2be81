"""The targets `cpu` and `cuda`, which ONNX Runtime runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import onnx

from edgelm.bundle import Requirement, capabilities
from edgelm.bundle.capabilities import Capabilities
from edgelm.bundle.formats import native_kv, portable_kv
from edgelm.bundle.ort_providers import CPU, CUDA, Provider
from edgelm.checkpoint.jsonfile import read_optional_json
from edgelm.errors import ExportError
from edgelm.export import activations
from edgelm.export.graph.base import LayerOps
from edgelm.export.graph.decoder import build
from edgelm.export.graph.native import NativeDecoder
from edgelm.export.graph.onnx_builder import EXACT, Dims, GraphBuilder
from edgelm.export.graph.portable import PortableOps
from edgelm.export.graph.portable_decoder import PortableDecoder
from edgelm.export.onnxruntime.genai import genai_config
from edgelm.export.onnxruntime.greedy_graph import greedy_graph
from edgelm.export.onnxruntime.router_probe import router_probe
from edgelm.export.onnxruntime.versions import onnxruntime_for
from edgelm.export.options import AUTO
from edgelm.export.packing.weights_file import WeightsPlan
from edgelm.export.plan import DEBUG_FILE, GRAPH_FILE, WEIGHTS_FILE, BuiltGraphs, ExportJob, GraphRequest, Target
from edgelm.progress import Progress
from edgelm.quant.source import WeightSource
from edgelm.runtimes.onnxruntime.cuda import GREEDY_FILE
from edgelm.runtimes.onnxruntime.native_library import library_path
from edgelm.runtimes.onnxruntime.router_probe import PROBE_FILE


class OnnxRuntimeTarget(Target):
    """Base of the targets that ONNX Runtime runs with one of its execution providers."""

    provider: Provider

    def float_dtype(self, asked: str, checkpoint: str, *, quantises: bool) -> str:
        """See `Target.float_dtype`; the execution provider decides."""
        return self.provider.float_dtype(asked, checkpoint, quantises=quantises)

    def capabilities(self, ops: str) -> Capabilities:
        """Return the features of our operators or of ONNX Runtime's own."""
        return capabilities.NATIVE if ops == "native" else capabilities.PORTABLE

    def notes(self, source: WeightSource) -> list[str]:
        """Return a note if the recipe asks for static activations, which these operators do not use."""
        return activations.notes_for_cpu(source)

    def build(self, request: GraphRequest) -> BuiltGraphs:
        """Build the graphs with the operator set of the request."""
        return self._native(request) if request.ops == "native" else self._portable(request)

    def _native(self, request: GraphRequest) -> BuiltGraphs:
        graph, weights = GraphBuilder(WEIGHTS_FILE), WeightsPlan()
        model = NativeDecoder(graph, weights, request.source, request.dtype, request.info, request.decoder)
        build(model, request.decoder)
        kv = native_kv(request.source.recipe)
        return self._graphs(request, graph, weights, model, model.debug_outputs, kv, lambda *_: None)

    def _portable(self, request: GraphRequest) -> BuiltGraphs:
        graph, weights, info = GraphBuilder(WEIGHTS_FILE), WeightsPlan(), request.info
        ops = PortableOps(graph, weights, request.source, request.dtype, self.provider)
        model = PortableDecoder(ops, info, request.decoder)
        model.build()
        recipe = request.source.recipe
        with ops.refusing(f"recipe {recipe.name}"):
            portable_kv(recipe, ops.compute)
        ops.check()

        def finish(folder: Path, job: ExportJob) -> None:
            generation = read_optional_json(folder / "generation_config.json")
            config = genai_config(job.plan.info, job.plan.tokens, GRAPH_FILE, generation, self.provider.session)
            (folder / "genai_config.json").write_text(
                json.dumps(config, indent=1) + "\n", encoding="utf-8", newline="\n"
            )

        return self._graphs(request, graph, weights, ops, model.debug_outputs, ops.compute, finish)

    def _graphs(
        self,
        request: GraphRequest,
        graph: GraphBuilder,
        weights: WeightsPlan,
        ops: LayerOps,
        outputs: Sequence[tuple[str, Dims]],
        kv: str,
        finish: Callable[[Path, ExportJob], None],
    ) -> BuiltGraphs:
        name = request.info.name
        main, debug = graph.model(name), graph.model(f"{name} (debug)", outputs, exact=EXACT)
        rounded = ops.rounded if self.provider.compute_type(request.dtype) == "float32" else None
        graphs = {GRAPH_FILE: main, DEBUG_FILE: debug, **self._helpers(main, request)}
        files = {name: model.SerializeToString() for name, model in graphs.items()}
        requires = self._requires(request, main, debug)
        return BuiltGraphs(files, GRAPH_FILE, DEBUG_FILE, weights, kv, finish, rounded, requires)

    def _requires(self, request: GraphRequest, *graphs: onnx.ModelProto) -> tuple[Requirement, ...]:
        """Return the package versions that the graphs need, if they are not simply those that EdgeLM needs."""
        del request, graphs
        return ()

    def _helpers(self, graph: onnx.ModelProto, request: GraphRequest) -> Mapping[str, onnx.ModelProto]:
        """Return small graphs that the runtime needs besides the model's, by file name."""
        del graph, request
        return {}


class CpuTarget(OnnxRuntimeTarget):
    """ONNX Runtime on the CPU, with our compiled operators or its own."""

    name = "cpu"
    provider = CPU

    def operator_set(self, ops: str, progress: Progress) -> str:
        """Return the operator set; "auto" is native if the compiled operators are installed, otherwise portable."""
        if ops != AUTO:
            return ops
        if library_path() is not None:
            return "native"
        progress.note(
            "exporting with portable operators, because this installation has no compiled ones: the bundle runs "
            "wherever ONNX Runtime does, but slower and with more memory than with native operators. For those, "
            "install edgelm where there is a C++ compiler, or export for another machine with --ops native"
        )
        return "portable"

    def _requires(self, request: GraphRequest, *graphs: onnx.ModelProto) -> tuple[Requirement, ...]:
        """Return the oldest usable ONNX Runtime for portable graphs. Native ones need the version EdgeLM depends on."""
        return onnxruntime_for(*graphs) if request.ops == "portable" else ()


class CudaTarget(OnnxRuntimeTarget):
    """ONNX Runtime's CUDA provider, with its own operators."""

    name = "cuda"
    provider = CUDA

    def operator_set(self, ops: str, progress: Progress) -> str:
        """Return "portable", the only operator set."""
        del progress
        if ops == "native":
            raise ExportError(
                "native operators run on CPUs only: leave --ops out, or export with --target tensorrt for our kernels"
            )
        return "portable"

    def notes(self, source: WeightSource) -> list[str]:
        """Return a note if the recipe asks for static activations, which this provider does not use."""
        return activations.notes_for_cuda(source)

    def _helpers(self, graph: onnx.ModelProto, request: GraphRequest) -> Mapping[str, onnx.ModelProto]:
        """Return the graph of greedy decoding and, for a MoE, the router probe."""
        helpers = {GREEDY_FILE: greedy_graph(request.info.vocab_size)}
        probe = router_probe(graph, self.provider.compute_type(request.dtype), request.info.experts_per_token)
        return helpers if probe is None else {**helpers, PROBE_FILE: probe}
