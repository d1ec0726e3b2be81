"""`export_bundle`: from a checkpoint and a recipe to a bundle that is complete or absent."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import math
import platform
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from edgelm.bundle import (
    MANIFEST,
    Bundle,
    CalibrationInfo,
    FileInfo,
    GraphInfo,
    Manifest,
    ModelInfo,
    RecipeInfo,
    SourceInfo,
    TensorEntry,
    TokenIds,
    sha256_of,
)
from edgelm.checkpoint import Checkpoint
from edgelm.devices import allowed_cores
from edgelm.errors import ExportError
from edgelm.export import activations, onnx_fox, onnx_olmoe
from edgelm.export.decoder import DecoderFrame
from edgelm.export.genai import genai_config
from edgelm.export.graph import Dims, GraphBuilder
from edgelm.export.memory import plan_memory
from edgelm.export.native import NativeDecoder
from edgelm.export.portable import PortableOps
from edgelm.export.providers import CPU, PROVIDERS, Provider
from edgelm.export.router_probe import router_probe
from edgelm.export.weights import WeightsPlan
from edgelm.files import atomic_directory, need_disk
from edgelm.models import family as family_of
from edgelm.parity.golden import GoldenOptions, golden_tokens, write_pack
from edgelm.parity.live import references
from edgelm.progress import Advance, Progress, Silent
from edgelm.quant.calibration import CalibrationOptions, CalibrationReport, calibrated
from edgelm.quant.recipe import Recipe
from edgelm.quant.source import WeightSource, stored_recipe
from edgelm.runtimes.native_library import library_path
from edgelm.runtimes.router_probe import PROBE_FILE
from edgelm.tokenizer import Tokenizer

GRAPH_FILE = "model.onnx"
DEBUG_FILE = "model.debug.onnx"
WEIGHTS_FILE = "model.onnx.data"
TARGETS = ("cpu", "cuda")
FLAVOURS = ("native", "portable")
AUTO = "auto"
DTYPES = ("auto", "float32", "float16", "bfloat16")
_SHORT_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_STORED = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_PORTABLE: dict[str, Callable[[PortableOps, ModelInfo, Any], DecoderFrame]] = {
    "olmoe": onnx_olmoe.build_portable,
    "fox": onnx_fox.build_portable,
}
_NATIVE: dict[str, Callable[[NativeDecoder, Any], None]] = {
    "olmoe": onnx_olmoe.build_native,
    "fox": onnx_fox.build_native,
}
# What an interpreter, a tokenizer or a template needs besides the tokenizer's own files.
_COPIED = ("config.json", "generation_config.json", "chat_template.jinja", "chat_template.json")


@dataclass(frozen=True)
class ExportOptions:
    """How to export.

    Attributes:
        target: device kind, one of `TARGETS`.
        ops: operator flavour, one of `FLAVOURS`; "auto" is native where this installation has the compiled operators
            and the target is a processor, else portable.
        dtype: storage of matrices the recipe keeps in float, one of `DTYPES` ("fp32", "fp16", "bf16" are understood);
            "auto" keeps the checkpoint's. The router and the norms are always float32.
        max_ram: bytes of resident memory not to exceed; None is no limit.
        threads: worker threads; None is one per processor allowed to this process.
        overwrite: replace an existing bundle (it stays until the new one is complete).
        golden: the parity pack's prompts and sizes; None takes the built-in ones.
        reference: float checkpoint (folder or hub id) that a quantised one was made from, for the parity pack's float
            reference; a float checkpoint is its own.
    """

    target: str = "cpu"
    ops: str = AUTO
    dtype: str = "auto"
    max_ram: int | None = None
    threads: int | None = None
    overwrite: bool = False
    golden: GoldenOptions | None = None
    reference: str | Path | None = None

    def __post_init__(self) -> None:
        for field, valid in (("target", TARGETS), ("ops", (AUTO, *FLAVOURS)), ("dtype", (*DTYPES, *_SHORT_DTYPES))):
            if getattr(self, field) not in valid:
                raise ExportError(f"{field} {getattr(self, field)!r} is not one of {', '.join(valid)}")


@dataclass(frozen=True)
class _Plan:
    """Everything that is known before the first byte is written."""

    info: ModelInfo
    ops: str
    tokens: TokenIds
    dtype: str
    kv: str
    weights: WeightsPlan
    graph: onnx.ModelProto
    debug_graph: onnx.ModelProto
    source_bytes: int
    provider: Provider = CPU
    probe: onnx.ModelProto | None = None


def export_bundle(
    checkpoint: str | Path | Checkpoint,
    out: str | Path,
    *,
    recipe: str | Path | Recipe | None = None,
    options: ExportOptions | None = None,
    calibration: CalibrationOptions | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Export a checkpoint (folder, hub id, or one that is open) to the bundle folder `out`.

    `recipe` is a preset's name, a TOML file or a `Recipe`; None is int4, or the recipe that a quantised checkpoint
    brings. The weights are read, quantised and written block by block and the reference runs layer by layer, so
    memory does not grow with the model's depth. With `calibration` the codes are chosen by what the model does with a
    text, see `edgelm.quant.calibration.calibrate_checkpoint`; what an interrupted run has done lies in
    `<out>.calibrating`, and the same call goes on from there.

    Raises:
        EdgeLMError: the checkpoint, the recipe or an option cannot be used, or memory or disk do not suffice. Nothing
            is left at `out` then, and what was there before stays.
    """
    options = options or ExportOptions()
    progress = progress or Silent()
    out = Path(out)
    if out.exists() and not options.overwrite:
        raise ExportError(f"{out} exists already: remove it, choose another place, or pass --overwrite")
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = Checkpoint.open(checkpoint, progress=progress)
    chosen = _recipe(recipe, checkpoint)
    options = dataclasses.replace(options, ops=_flavour(options, progress))
    original = None if options.reference is None else _original(checkpoint, options.reference, progress)
    if calibration is None:
        # The export's own threads each work on a tensor, so the kernel inside takes one.
        source = WeightSource(checkpoint, chosen, threads=1)
        report = CalibrationReport.read(checkpoint.path) if source.is_stored_quantized else None
        return _export(source, out, options, None if report is None else report.info, original, progress)
    if chosen is None:
        raise ExportError(f"{checkpoint.path} is already quantised: calibration starts from the float checkpoint")
    # What cannot be exported is to be refused before hours of calibration.
    _prepare(WeightSource(checkpoint, chosen, threads=1), out, options, Silent())
    with calibrated(checkpoint, chosen, calibration, out, threads=options.threads, progress=progress, copies=2) as (
        source,
        report,
    ):
        # Of a smoothed checkpoint, too, the float reference is the one that was given.
        return _export(source, out, options, report.info, checkpoint, progress)


def _export(
    source: WeightSource,
    out: Path,
    options: ExportOptions,
    calibration: CalibrationInfo | None,
    original: Checkpoint | None,
    progress: Progress,
) -> Bundle:
    """Write the bundle of the weights that `source` gives; `original` is the float checkpoint that they were made from,
    None where it is `source`'s own or unknown.
    """
    note = activations.about_static(source)
    if note is not None:
        progress.note(note)
    tokenizer, golden, plan, threads = _prepare(source, out, options, progress)
    checkpoint = source.checkpoint
    with atomic_directory(out, overwrite=options.overwrite) as folder:
        tensors, hashes = _write_weights(plan, checkpoint, folder, threads, progress)
        (folder / GRAPH_FILE).write_bytes(plan.graph.SerializeToString())
        (folder / DEBUG_FILE).write_bytes(plan.debug_graph.SerializeToString())
        _copy_texts(checkpoint.path, tokenizer, folder)
        if plan.ops == "portable":
            _write_genai(folder, plan)
        if plan.probe is not None:
            (folder / PROBE_FILE).write_bytes(plan.probe.SerializeToString())
        (folder / "parity").mkdir()
        reference, quantised = references(source, plan.dtype, original)
        write_pack(folder / "parity", reference, quantised, checkpoint.config, tokenizer, golden, progress)
        _write_manifest(
            folder, plan, source.recipe, checkpoint.source_id, tensors, hashes, options, calibration, progress
        )
    return Bundle.open(out)


def _prepare(
    source: WeightSource, out: Path, options: ExportOptions, progress: Progress
) -> tuple[Tokenizer, GoldenOptions, _Plan, int]:
    """Everything that can be refused before the first byte is written; and how many threads memory allows."""
    checkpoint = source.checkpoint
    family = family_of(checkpoint.config)
    config = family.config_class.from_dict(checkpoint.config)
    source.check_tensors(family.tensor_shapes(config))
    tokenizer = Tokenizer.from_folder(checkpoint.path)
    if tokenizer.vocab_size > config.vocab_size:
        raise ExportError(
            f"{checkpoint.path}: the tokenizer has {tokenizer.vocab_size} tokens, the model's table only "
            f"{config.vocab_size} rows: this is another model's tokenizer"
        )
    for note in tokenizer.notes:
        progress.note(note)
    golden = options.golden or GoldenOptions.default_for(config)
    plan = _plan(checkpoint, source, tokenizer, family.name, config, options)
    threads = options.threads or allowed_cores()
    memory = plan_memory(
        plan.info, config.intermediate_size, golden_tokens(golden, tokenizer), threads, options.max_ram
    )
    need_disk(out, plan.weights.size + (64 << 20))
    return tokenizer, golden, plan, memory.threads


def _original(checkpoint: Checkpoint, reference: str | Path, progress: Progress) -> Checkpoint:
    """The float checkpoint `reference`, of which `checkpoint` is said to be the quantised form."""
    if checkpoint.config.get("quantization_config") is None:
        raise ExportError(f"{checkpoint.path} is a float checkpoint and its own reference: leave --reference out")
    original = Checkpoint.open(reference, progress=progress)
    if original.config.get("quantization_config") is not None:
        raise ExportError(f"{original.path} is quantised: --reference takes the float checkpoint")
    configs = [
        family_of(opened.config).config_class.from_dict(
            {key: value for key, value in opened.config.items() if key != "quantization_config"}
        )
        for opened in (checkpoint, original)
    ]
    if configs[0] != configs[1]:
        fields = [
            field.name
            for field in dataclasses.fields(configs[0])
            if getattr(configs[0], field.name) != getattr(configs[1], field.name, None)
        ]
        raise ExportError(
            f"{original.path} is not what {checkpoint.path} was made from: config.json differs in {', '.join(fields)}"
        )
    original.check_tensors(original.family.tensor_shapes(configs[1]))
    return original


def _recipe(recipe: str | Path | Recipe | None, checkpoint: Checkpoint) -> Recipe | None:
    """None stays None for a quantised checkpoint, which brings its own, and is int4 for any other."""
    if recipe is None:
        return None if stored_recipe(checkpoint.config) is not None else Recipe.load("int4")
    return recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)


def _flavour(options: ExportOptions, progress: Progress) -> str:
    """The operators to export for."""
    if options.target == "cuda":
        if options.ops == "native":
            raise ExportError(
                "native operators are for processors: leave --ops out, or export with --target tensorrt for our own on "
                "a GPU"
            )
        return "portable"
    if options.ops != AUTO:
        return options.ops
    if options.target == "cpu" and library_path() is not None:
        return "native"
    progress.note(
        "exporting with portable operators, because this installation has no compiled ones: the bundle runs wherever "
        "ONNX Runtime does, but slower and with more memory than with native operators; to have them, install edgelm "
        "where there is a C++ compiler, or export for another machine with --ops native"
    )
    return "portable"


def _plan(
    checkpoint: Checkpoint, source: WeightSource, tokenizer: Tokenizer, family: str, config: Any, options: ExportOptions
) -> _Plan:
    info = ModelInfo(
        family=family,
        name=checkpoint.source_id,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        context_length=config.max_position_embeddings,
        tied=config.tie_word_embeddings,
        num_experts=getattr(config, "num_experts", 0),
        experts_per_token=getattr(config, "num_experts_per_tok", 0),
        norm_topk_prob=getattr(config, "norm_topk_prob", False),
    )
    provider = PROVIDERS.get(options.target, CPU)
    quantises = any(source.scheme(name) is not None for name in source.shapes)
    dtype = provider.storage(
        _SHORT_DTYPES.get(options.dtype, options.dtype), _float_type(checkpoint, source), quantises=quantises
    )
    weights = WeightsPlan()
    graph = GraphBuilder(WEIGHTS_FILE)
    debug_outputs: Sequence[tuple[str, Dims]]
    probe = None
    if options.ops == "native":
        model = NativeDecoder(graph, weights, source, dtype, info, config.rms_norm_eps, config.rope_theta)
        _NATIVE[family](model, config)
        debug_outputs = model.debug_outputs
    else:
        ops = PortableOps(graph, weights, source, dtype, provider)
        debug_outputs = _PORTABLE[family](ops, info, config).debug_outputs
        if options.target == "cuda":
            probe = router_probe(graph.model(info.name), ops, info.experts_per_token)
    return _Plan(
        info=info,
        ops=options.ops,
        tokens=TokenIds(tokenizer.bos_id, tuple(tokenizer.eos_ids), tokenizer.pad_id),
        dtype=dtype,
        kv=_kv_dtype(options.ops, source.recipe, provider.compute_type(dtype)),
        weights=weights,
        graph=graph.model(info.name),
        debug_graph=graph.model(f"{info.name} (debug)", debug_outputs, exact=True),
        source_bytes=sum(tensor.nbytes for tensor in checkpoint.tensors.values()),
        provider=provider,
        probe=probe,
    )


def _float_type(checkpoint: Checkpoint, source: WeightSource) -> str:
    """The type of most values that stay float: scales are of another, and a calibrated checkpoint's routers too."""
    counts: dict[str, int] = {}
    for name, shape in source.shapes.items():
        if source.scheme(name) is None and checkpoint.tensors[name].dtype in _STORED:
            dtype = _STORED[checkpoint.tensors[name].dtype]
            if not name.endswith(".mlp.gate.weight"):
                counts[dtype] = counts.get(dtype, 0) + math.prod(shape)
    return max(counts, key=lambda dtype: counts[dtype], default="float32")


def _write_weights(
    plan: _Plan, checkpoint: Checkpoint, folder: Path, threads: int, progress: Progress
) -> tuple[tuple[TensorEntry, ...], Mapping[str, Any]]:
    # The source's hashes are taken on the side: they are bound by the digest, the quantiser by its arithmetic.
    stop = threading.Event()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="hash") as pool:
        hashes: Future[Mapping[str, Any]] = pool.submit(checkpoint.hashes, _Stoppable(stop))
        try:
            with progress.task("quantising", plan.source_bytes) as advance:
                tensors = plan.weights.write(folder / WEIGHTS_FILE, threads, advance)
        except BaseException:
            # Leaving the pool waits for its thread, which would read on to the end of a large checkpoint.
            stop.set()
            raise
        return tensors, hashes.result()


class _Stoppable(Progress):
    """Reports nothing, and ends the work at its next report once `stop` is set."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop

    @contextlib.contextmanager
    def task(self, label: str, total: float, *, unit: str = "bytes") -> Iterator[Advance]:
        """Yield what raises when the work is to end."""
        del label, total, unit

        def advance(amount: float) -> None:
            if self._stop.is_set():
                raise CancelledError

        yield advance


def _copy_texts(source: Path, tokenizer: Tokenizer, folder: Path) -> None:
    names = {path.name: path for path in tokenizer.files}
    names |= {name: source / name for name in _COPIED if (source / name).is_file()}
    for name, path in sorted(names.items()):
        shutil.copyfile(path, folder / name)


def _write_genai(folder: Path, plan: _Plan) -> None:
    path = folder / "generation_config.json"
    generation = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    config = genai_config(plan.info, plan.tokens, GRAPH_FILE, generation, plan.provider.session)
    (folder / "genai_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def _write_manifest(
    folder: Path,
    plan: _Plan,
    recipe: Recipe,
    source_id: str,
    tensors: tuple[TensorEntry, ...],
    hashes: Mapping[str, Any],
    options: ExportOptions,
    calibration: CalibrationInfo | None,
    progress: Progress,
) -> None:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {}
    with progress.task("hashing", sum(path.stat().st_size for path in paths)) as advance:
        for path in paths:
            files[path.relative_to(folder).as_posix()] = FileInfo(path.stat().st_size, sha256_of(path, advance))
    manifest = Manifest(
        model=plan.info,
        target=options.target,
        ops=plan.ops,
        dtype=plan.dtype,
        recipe=RecipeInfo(recipe.name, recipe.to_toml()),
        graph=GraphInfo(GRAPH_FILE, DEBUG_FILE, WEIGHTS_FILE, plan.kv),
        tokens=plan.tokens,
        source=SourceInfo(source_id, {name: FileInfo(**info) for name, info in hashes.items()}),
        files=files,
        tensors=tensors,
        tools=_tool_versions(),
        calibration=calibration,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")


def _kv_dtype(ops: str, recipe: Recipe, compute: str = "float32") -> str:
    """The type of cache that a runtime allocates unless told otherwise: the recipe's, if it has one.

    Else it does not round where nothing else does. `compute` is what a portable graph computes in.

    Raises:
        ExportError: these operators have no such cache.
    """
    if ops == "portable":
        if recipe.kv not in (AUTO, compute):
            raise ExportError(
                f'recipe {recipe.name} has kv = "{recipe.kv}", but portable operators have {compute} caches only here: '
                "export for a processor with --ops native, or leave kv out"
            )
        return compute
    exact = recipe.default is None and all(rule.scheme is None for rule in recipe.rules)
    return recipe.kv if recipe.kv != AUTO else "float32" if exact else "float16"


def _tool_versions() -> dict[str, str]:
    import torch

    import edgelm

    return {
        "edgelm": edgelm.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "onnx": onnx.__version__,
        "torch": torch.__version__,
        "tokenizers": importlib.metadata.version("tokenizers"),
    }
