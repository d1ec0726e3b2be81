"""The targets `cpu` and `cuda`: what ONNX Runtime runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import onnx

from edgelm.bundle import ModelInfo, Requirement
from edgelm.checkpoint.jsonfile import read_optional_json
from edgelm.errors import ExportError
from edgelm.export import activations, capabilities
from edgelm.export.capabilities import Capabilities
from edgelm.export.graph.base import LayerOps
from edgelm.export.graph.decoder import build
from edgelm.export.graph.native import NativeDecoder
from edgelm.export.graph.onnx_builder import EXACT, Dims, GraphBuilder
from edgelm.export.graph.ort_providers import CPU, CUDA, Provider
from edgelm.export.graph.portable import PortableOps
from edgelm.export.graph.portable_decoder import PortableDecoder
from edgelm.export.onnxruntime.genai import genai_config
from edgelm.export.onnxruntime.greedy_graph import greedy_graph
from edgelm.export.onnxruntime.router_probe import router_probe
from edgelm.export.onnxruntime.versions import onnxruntime_for
from edgelm.export.options import AUTO, ExportOptions
from edgelm.export.packing.weights_file import WeightsPlan
from edgelm.export.plan import DEBUG_FILE, GRAPH_FILE, WEIGHTS_FILE, Graphs, Order, Plan, Target
from edgelm.progress import Progress
from edgelm.quant.recipe import Recipe
from edgelm.quant.source import WeightSource
from edgelm.runtimes.onnxruntime.cuda import GREEDY_FILE
from edgelm.runtimes.onnxruntime.native_library import library_path
from edgelm.runtimes.onnxruntime.router_probe import PROBE_FILE


class OnnxRuntimeTarget(Target):
    """What ONNX Runtime runs with one of its execution providers."""

    provider: Provider

    def storage(self, asked: str, checkpoint: str, *, quantises: bool) -> str:
        """As the provider has it."""
        return self.provider.storage(asked, checkpoint, quantises=quantises)

    def capabilities(self, ops: str) -> Capabilities:
        """Ours, or ONNX Runtime's own."""
        return capabilities.NATIVE if ops == "native" else capabilities.PORTABLE

    def about(self, source: WeightSource) -> str | None:
        """Static activations have no use here."""
        return activations.note_for_cpu(source)

    def build(self, order: Order) -> Graphs:
        """Build the graphs in the operators of the order."""
        return self._native(order) if order.ops == "native" else self._portable(order)

    def _native(self, order: Order) -> Graphs:
        graph, weights = GraphBuilder(WEIGHTS_FILE), WeightsPlan()
        model = NativeDecoder(graph, weights, order.source, order.dtype, order.info, order.decoder)
        build(model, order.decoder)
        kv = _native_kv_dtype(order.source.recipe)
        return self._graphs(order, graph, weights, model, model.debug_outputs, kv, lambda *_: None)

    def _portable(self, order: Order) -> Graphs:
        graph, weights, info = GraphBuilder(WEIGHTS_FILE), WeightsPlan(), order.info
        ops = PortableOps(graph, weights, order.source, order.dtype, self.provider)
        model = PortableDecoder(ops, info, order.decoder)
        model.build()
        kv, recipe = ops.compute, order.source.recipe
        if recipe.kv not in (AUTO, kv):
            ops.refuse(
                f"recipe {recipe.name}",
                f'has kv = "{recipe.kv}", but portable operators have {kv} caches only here: '
                "export for the CPU with --ops native, or leave kv out",
            )
        ops.check()
        helpers = self._helpers(graph.model(info.name), ops, info)

        def finish(folder: Path, plan: Plan, options: ExportOptions, progress: Progress) -> None:
            del options, progress
            generation = read_optional_json(folder / "generation_config.json")
            config = genai_config(plan.info, plan.tokens, GRAPH_FILE, generation, self.provider.session)
            (folder / "genai_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
            for name, model in helpers.items():
                (folder / name).write_bytes(model.SerializeToString())

        return self._graphs(order, graph, weights, ops, model.debug_outputs, kv, finish)

    def _graphs(
        self,
        order: Order,
        graph: GraphBuilder,
        weights: WeightsPlan,
        ops: LayerOps,
        outputs: Sequence[tuple[str, Dims]],
        kv: str,
        finish: Callable[[Path, Plan, ExportOptions, Progress], None],
    ) -> Graphs:
        name = order.info.name
        main, debug = graph.model(name), graph.model(f"{name} (debug)", outputs, exact=EXACT)
        rounded = ops.rounded if self.provider.compute_type(order.dtype) == "float32" else None
        files = {GRAPH_FILE: main.SerializeToString(), DEBUG_FILE: debug.SerializeToString()}
        requires = self._requires(order, main, debug)
        return Graphs(files, GRAPH_FILE, DEBUG_FILE, weights, kv, finish, rounded, requires)

    def _requires(self, order: Order, *graphs: onnx.ModelProto) -> tuple[Requirement, ...]:
        """The versions of packages that the graphs need, where they are known to be other than EdgeLM's own."""
        del order, graphs
        return ()

    def _helpers(self, graph: onnx.ModelProto, ops: PortableOps, info: ModelInfo) -> Mapping[str, onnx.ModelProto]:
        """Small graphs that the runtime wants beside the model's, by the names of their files."""
        del graph, ops, info
        return {}


class CpuTarget(OnnxRuntimeTarget):
    """ONNX Runtime on the processor, with our compiled operators or its own."""

    name = "cpu"
    provider = CPU

    def flavour(self, ops: str, progress: Progress) -> str:
        """Native where this installation has the compiled operators."""
        if ops != AUTO:
            return ops
        if library_path() is not None:
            return "native"
        progress.note(
            "exporting with portable operators, because this installation has no compiled ones: the bundle runs "
            "wherever ONNX Runtime does, but slower and with more memory than with native operators; to have them, "
            "install edgelm where there is a C++ compiler, or export for another machine with --ops native"
        )
        return "portable"

    def _requires(self, order: Order, *graphs: onnx.ModelProto) -> tuple[Requirement, ...]:
        """The least ONNX Runtime for portable graphs; native ones are tested with EdgeLM's own alone."""
        return onnxruntime_for(*graphs) if order.ops == "portable" else ()


class CudaTarget(OnnxRuntimeTarget):
    """ONNX Runtime's CUDA provider, with its own operators."""

    name = "cuda"
    provider = CUDA

    def flavour(self, ops: str, progress: Progress) -> str:
        """Portable, the only one."""
        del progress
        if ops == "native":
            raise ExportError(
                "native operators are for processors: leave --ops out, or export with --target tensorrt for our own on "
                "a GPU"
            )
        return "portable"

    def about(self, source: WeightSource) -> str | None:
        """Static activations have no use here either."""
        return activations.note_for_cuda(source)

    def _helpers(self, graph: onnx.ModelProto, ops: PortableOps, info: ModelInfo) -> Mapping[str, onnx.ModelProto]:
        """One that chooses the next token, and for a mixture one that shows whether a device routes as asked."""
        helpers = {GREEDY_FILE: greedy_graph(info.vocab_size)}
        probe = router_probe(graph, ops, info.experts_per_token)
        return helpers if probe is None else {**helpers, PROBE_FILE: probe}


def _native_kv_dtype(recipe: Recipe) -> str:
    """The type of cache that a runtime allocates unless told otherwise: the recipe's, if it has one.

    Else it does not round where nothing else does.
    """
    exact = recipe.default is None and all(rule.scheme is None for rule in recipe.rules)
    return recipe.kv if recipe.kv != AUTO else "float32" if exact else "float16"
