"""Is a bundle complete or absent, does it say what it is, and does ONNX Runtime GenAI run it?"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import pytest
from tiny_models import OPERATOR_SETS, MakeCheckpoint

import edgelm
from edgelm.bundle import Bundle, sha256_of
from edgelm.bundle.cpu_layout import RESCORE
from edgelm.checkpoint import Checkpoint
from edgelm.errors import EdgeLMError, ExportError, MemoryLimitError
from edgelm.export import ExportOptions, export_bundle
from edgelm.parity.golden import GoldenOptions
from edgelm.parity.prompts import Prompt
from edgelm.progress import Advance, Progress, Silent
from edgelm.quant.checkpoint import quantize_checkpoint
from edgelm.quant.recipe import Recipe

SHORT = GoldenOptions(prompts=(Prompt("short", "The quick brown fox"),), greedy_tokens=2)
OPTIONS = ExportOptions(golden=SHORT, threads=2)
PORTABLE = ExportOptions(golden=SHORT, threads=2, ops="portable")
NATIVE = ExportOptions(golden=SHORT, threads=2, ops="native")
Bundles = dict[tuple[str, str], Bundle]


@pytest.fixture(scope="module")
def portable(checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    folder = tmp_path_factory.mktemp("bundles")
    return {
        (name, recipe): export_bundle(checkpoint(name), folder / f"{name}-{recipe}", recipe=recipe, options=PORTABLE)
        for name in ("olmoe", "fox")
        for recipe in ("int4", "int8")
    }


@pytest.fixture(scope="module")
def native(checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    # This needs no compiled operators: only running a bundle does, not writing it.
    folder = tmp_path_factory.mktemp("native")
    return {
        (name, "int4"): export_bundle(checkpoint(name), folder / name, recipe="int4", options=NATIVE)
        for name in ("olmoe", "fox")
    }


@pytest.fixture(params=["native", "portable"])
def bundles(request: pytest.FixtureRequest) -> Bundles:
    found: Bundles = request.getfixturevalue(request.param)
    return found


@pytest.mark.parametrize("recipe", ["int4", "int8"])
@pytest.mark.parametrize("name", ["olmoe", "fox"])
def test_genai_generates_the_same_greedy_tokens(portable: Bundles, name: str, recipe: str) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    bundle = portable[name, recipe]
    prompt = list(range(5, 45))
    model = genai.Model(str(bundle.path))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + 24, min_length=len(prompt) + 24, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    theirs = [int(token) for token in generator.get_sequence(0)][len(prompt) :]
    with edgelm.load(bundle.path, threads=1) as ours:
        logits = ours.runtime.prefill(prompt)
        tokens: list[int] = []
        for _ in theirs:
            tokens.append(_best(logits, bundle.manifest.tokens.eos_ids))
            logits = ours.runtime.decode(tokens[-1])
    assert len(theirs) == 24
    assert theirs == tokens


def _best(logits: np.ndarray, never: tuple[int, ...]) -> int:
    """Return the greedy choice as GenAI makes it under min_length, without the end tokens."""
    masked = logits.copy()
    masked[list(never)] = -np.inf
    return int(masked.argmax())


def test_manifest_describes_what_was_written(bundles: Bundles, checkpoint: MakeCheckpoint) -> None:
    bundle = bundles["olmoe", "int4"]
    manifest = bundle.manifest
    on_disk = {p.relative_to(bundle.path).as_posix() for p in bundle.path.rglob("*") if p.is_file()}
    assert on_disk == set(manifest.files) | {"manifest.json"}
    for name, info in manifest.files.items():
        assert (info.size, info.sha256) == (bundle.file(name).stat().st_size, sha256_of(bundle.file(name)))
    source = checkpoint("olmoe")
    assert manifest.source.files["model.safetensors"].sha256 == sha256_of(source / "model.safetensors")
    assert (manifest.model.num_experts, manifest.model.experts_per_token) == (16, 4)
    assert manifest.recipe.name == "int4"
    assert Recipe.from_toml(manifest.recipe.toml, "manifest") == Recipe.load("int4")
    assert bundle.verify() == []


def test_a_damaged_weight_is_named_by_tensor_and_layer(bundles: Bundles, tmp_path: Path) -> None:
    import shutil

    damaged = tmp_path / "damaged"
    shutil.copytree(bundles["olmoe", "int4"].path, damaged)
    bundle = Bundle.open(damaged)
    names = ("layers.1.moe.down.qweight", "layers.1.moe.experts")
    entry = next(e for e in bundle.manifest.tensors if e.name in names)
    with bundle.file("model.onnx.data").open("r+b") as stream:
        stream.seek(entry.offset + 100)
        byte = stream.read(1)[0]
        stream.seek(entry.offset + 100)
        stream.write(bytes([byte ^ 1]))
    assert bundle.verify() == [f"model.onnx.data: tensor {entry.name} (layer 1) differs from what was exported"]
    with bundle.file("model.onnx.data").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(EdgeLMError, match=r"model\.onnx\.data has \d+ bytes, the manifest says"):
        Bundle.open(damaged)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format_version=2), "format_version is 2, this EdgeLM reads 1: upgrade edgelm"),
        (lambda m: m.update(format_version="1"), 'format_version is "1" (a string), this EdgeLM reads 1: export the'),
        (lambda m: m.update(format_version=True), "format_version is true, this EdgeLM reads 1: export the"),
        (lambda m: m.update(format="other"), "not the manifest of an EdgeLM bundle"),
        (lambda m: m["model"].pop("family"), "manifest.json: model.family is missing, expected a text: export the"),
        (lambda m: m["model"].update(num_layers=10**9), "model.num_layers is 1000000000, expected a whole number from"),
        (lambda m: m["model"].update(num_layers=3), "model.num_layers is 3, and tensors belong to 2 layers"),
        (lambda m: m["model"].update(num_layers="2"), 'model.num_layers is "2" (a string), expected a whole number'),
        (lambda m: m["model"].update(num_kv_heads=7), "no multiple of num_kv_heads, 7"),
        (lambda m: m["model"].update(experts_per_token=2), "experts_per_token is 2, and num_experts 0"),
        (lambda m: m["tensors"][1].update(offset=0), "overlaps the one before it"),
        (lambda m: m["tensors"][-1].update(size=10**9), "and model.onnx.data at"),
        (lambda m: m["tokens"].update(eos_ids=[0, 1.5]), "tokens.eos_ids[1] is 1.5, expected a whole number from 0"),
        (lambda m: m["tools"].update({"x": 1}), "tools.x is 1, expected a text"),
        (lambda m: m.update(quantum=True), "quantum is an unknown field (upgrade edgelm if a newer"),
        (lambda m: m["files"].update({"../x": {"size": 1, "sha256": ""}}), "outside the bundle"),
        (lambda m: m["files"].update({"gone.bin": {"size": 1, "sha256": ""}}), "gone.bin is missing"),
    ],
)
def test_a_wrong_manifest_is_refused(bundles: Bundles, tmp_path: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    import shutil

    folder = tmp_path / "bundle"
    shutil.copytree(bundles["fox", "int4"].path, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(EdgeLMError, match=re.escape(message)):
        Bundle.open(folder)


def test_tied_table_is_stored_once(portable: Bundles) -> None:
    bundle = portable["fox", "int4"]
    model = onnx.load(bundle.file("model.onnx"), load_external_data=False)
    places = {}
    for tensor in model.graph.initializer:
        external = {entry.key: entry.value for entry in tensor.external_data}
        if external:
            places.setdefault((external["offset"], external["length"]), []).append(tensor.name)
    shared = [names for names in places.values() if len(names) > 1]
    assert shared == [["model.embed_tokens.qweight.table", "logits.B"]]
    stored = sum(entry.size for entry in bundle.manifest.tensors if entry.name.startswith("model.embed_tokens"))
    vocabulary, hidden = bundle.manifest.model.vocab_size, bundle.manifest.model.hidden_size
    assert stored < 1.2 * vocabulary * hidden


def test_a_native_tied_table_is_one_initializer_for_lookup_and_head(native: Bundles) -> None:
    bundle = native["fox", "int4"]
    model = onnx.load(bundle.file("model.onnx"), load_external_data=False)
    users = [node.op_type for node in model.graph.node if "model.embed_tokens.weight" in node.input]
    assert users == ["QuantEmbedding", "QuantLinear"]
    stored = {entry.name: entry.size for entry in bundle.manifest.tensors if entry.name.startswith("model.embed")}
    vocabulary, hidden = bundle.manifest.model.vocab_size, bundle.manifest.model.hidden_size
    assert set(stored) == {"model.embed_tokens.weight", "model.embed_tokens.weight.lower"}
    assert stored["model.embed_tokens.weight.lower"] == vocabulary * hidden // 2
    assert sum(stored.values()) < 1.05 * vocabulary * hidden + 64


def test_a_native_decode_reads_half_of_the_head_and_the_debug_graph_all(native: Bundles) -> None:
    for file, expected in (("model.onnx", (RESCORE, b"int8")), ("model.debug.onnx", (0, b"float32"))):
        model = onnx.load(native["olmoe", "int4"].file(file), load_external_data=False)
        head = next(node for node in model.graph.node if "logits" in node.output)
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in head.attribute}
        assert (attributes["refine"], attributes["activations"]) == expected


def test_a_native_layer_has_few_nodes(native: Bundles) -> None:
    for name, per_layer in (("fox", 5), ("olmoe", 4)):
        model = onnx.load(native[name, "int4"].file("model.onnx"), load_external_data=False)
        operators = [node.op_type for node in model.graph.node]
        # The other nodes are the lookup, the slice of the last position and the head.
        assert len(operators) == 2 * per_layer + 3, operators
        assert {op.domain for op in model.opset_import} == {"", "edgelm"}


def test_only_portable_bundles_are_for_genai(native: Bundles, portable: Bundles) -> None:
    assert portable["fox", "int4"].file("genai_config.json").is_file()
    assert not native["fox", "int4"].file("genai_config.json").exists()
    assert (portable["fox", "int4"].manifest.ops, native["fox", "int4"].manifest.ops) == ("portable", "native")
    assert native["fox", "int4"].manifest.graph.kv_dtype == "float16"


def test_without_compiled_operators_the_export_is_portable_and_says_what_is_lost(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGELM_OPS_LIBRARY", "")
    notes: list[str] = []

    class Noting(Silent):
        def note(self, message: str) -> None:
            notes.append(message)

    bundle = export_bundle(checkpoint("fox"), tmp_path / "b", options=OPTIONS, progress=Noting())
    assert bundle.manifest.ops == "portable"
    assert any("slower and with more memory" in note and "C++ compiler" in note for note in notes)


@pytest.mark.skipif("native" not in OPERATOR_SETS, reason="needs the compiled operators")
def test_with_compiled_operators_the_export_is_native(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    assert export_bundle(checkpoint("fox"), tmp_path / "b", options=OPTIONS).manifest.ops == "native"


def test_the_router_is_float32_and_does_not_renormalise(portable: Bundles) -> None:
    model = onnx.load(portable["olmoe", "int4"].file("model.onnx"), load_external_data=False)
    moes = [node for node in model.graph.node if node.op_type == "QMoE"]
    assert len(moes) == portable["olmoe", "int4"].manifest.model.num_layers
    for node in moes:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert attributes["normalize_routing_weights"] == 0
        producer = next(n for n in model.graph.node if node.input[14] in n.output)
        assert producer.op_type == "Softmax"
        assert producer.input[0] == node.input[1]


def test_a_quantised_checkpoint_exports_to_the_same_weights(
    bundles: Bundles, checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    quantize_checkpoint(checkpoint("olmoe"), tmp_path / "quantised", Recipe.load("int4"))
    direct = bundles["olmoe", "int4"]
    options = dataclasses.replace(OPTIONS, ops=direct.manifest.ops)
    bundle = export_bundle(tmp_path / "quantised", tmp_path / "bundle", options=options)
    assert bundle.manifest.files["model.onnx.data"] == direct.manifest.files["model.onnx.data"]
    assert bundle.manifest.recipe.name == "int4"


def test_two_exports_write_the_same_bytes(bundles: Bundles, checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    first = bundles["fox", "int4"]
    options = dataclasses.replace(OPTIONS, ops=first.manifest.ops)
    again = export_bundle(checkpoint("fox"), tmp_path / "again", recipe="int4", options=options)
    assert again.manifest.files["model.onnx.data"] == first.manifest.files["model.onnx.data"]


class _Interrupting(Progress):
    """Raises KeyboardInterrupt in the middle of a task, like Ctrl-C."""

    def __init__(self, label: str, error: BaseException) -> None:
        self.label = label
        self.error = error

    @contextmanager
    def task(self, label: str, total: float, *, unit: str = "bytes") -> Iterator[Advance]:
        def advance(amount: float) -> None:
            if label == self.label:
                raise self.error

        yield advance


@pytest.mark.parametrize("label", ["quantising", "reference", "hashing"])
def test_an_interrupted_export_leaves_nothing_and_keeps_the_old_bundle(
    checkpoint: MakeCheckpoint, tmp_path: Path, label: str
) -> None:
    out = tmp_path / "bundle"
    with pytest.raises(KeyboardInterrupt):
        export_bundle(checkpoint("fox"), out, options=OPTIONS, progress=_Interrupting(label, KeyboardInterrupt()))
    assert list(tmp_path.iterdir()) == []
    first = export_bundle(checkpoint("fox"), out, recipe="int8", options=OPTIONS)
    options = ExportOptions(golden=SHORT, overwrite=True)
    with pytest.raises(KeyboardInterrupt):
        export_bundle(checkpoint("fox"), out, options=options, progress=_Interrupting(label, KeyboardInterrupt()))
    assert list(tmp_path.iterdir()) == [out]
    assert Bundle.open(out).manifest == first.manifest
    assert export_bundle(checkpoint("fox"), out, options=options).manifest.recipe.name == "int4"


def test_an_interruption_does_not_wait_for_the_checkpoints_hashes(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = threading.Event()

    def endless(self: Checkpoint, progress: Progress) -> None:
        # Like hashing a very large checkpoint: it reports progress and does not end by itself.
        try:
            with progress.task("hash checkpoint", 1) as advance:
                deadline = time.monotonic() + 30
                while time.monotonic() < deadline:
                    advance(0)
        except CancelledError:
            ended.set()
            raise

    monkeypatch.setattr(Checkpoint, "hashes", endless)
    with pytest.raises(KeyboardInterrupt):
        export_bundle(
            checkpoint("fox"),
            tmp_path / "b",
            options=OPTIONS,
            progress=_Interrupting("quantising", KeyboardInterrupt()),
        )
    assert ended.is_set()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing_and_says_so(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(EdgeLMError, match="the disk is full while writing"):
        export_bundle(checkpoint("fox"), tmp_path / "b", options=OPTIONS, progress=_Interrupting("quantising", full))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
def test_signals_leave_no_bundle_and_the_next_run_starts_clean(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    command = [sys.executable, "-P", "-m", "edgelm", "export", str(checkpoint("olmoe")), "-o", str(out)]
    for sent, code in ((signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -signal.SIGKILL)):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(".bundle.partial-*/model.onnx.data")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(sent)
        assert process.wait(60) == code
        assert not out.exists()
        left = list(tmp_path.iterdir())
        assert len(left) == (2 if sent == signal.SIGKILL else 0), left  # the lock's file and the unfinished bundle
    export_bundle(checkpoint("olmoe"), out, options=OPTIONS)
    assert list(tmp_path.iterdir()) == [out]


def test_what_cannot_be_done_is_refused_before_any_work(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    path, out = checkpoint("fox"), tmp_path / "bundle"
    with pytest.raises(
        MemoryLimitError, match=r"--max-ram 52.4 MB is too little: this export takes about [0-9.]+ [MG]B"
    ):
        export_bundle(path, out, options=ExportOptions(golden=SHORT, max_ram=50 << 20))
    with pytest.raises(ExportError, match="target 'tpu' is not one of cpu"):
        ExportOptions(target="tpu")
    with pytest.raises(ExportError, match="ops 'own' is not one of auto, native, portable"):
        ExportOptions(ops="own")
    with pytest.raises(ExportError, match="dtype 'int3' is not one of"):
        ExportOptions(dtype="int3")
    out.mkdir()
    with pytest.raises(EdgeLMError, match="exists already"):
        export_bundle(path, out, options=OPTIONS)
    text = 'name = "x"\ndefault = "int8-g32-sym"\n[[rule]]\nmatch = "*.experts.0.*"\nscheme = "float"\n'
    with pytest.raises(
        ExportError, match=r"experts\.0\.gate_proj\.weight stays float in this recipe.*same for 1 more\)$"
    ):
        export_bundle(checkpoint("olmoe"), tmp_path / "mixed", recipe=Recipe.from_toml(text, "x"), options=PORTABLE)
    for scheme in ("int3-g32-sym", "fp8-row"):
        own = Recipe.from_toml(f'name = "x"\ndefault = "{scheme}"\n', "x")
        with pytest.raises(ExportError, match=rf"is {scheme} in this recipe.*--ops native"):
            export_bundle(path, tmp_path / "few-bits", recipe=own, options=PORTABLE)
    text = text.replace("*.experts.0.*", "*.experts.0.up_proj.weight")
    with pytest.raises(ExportError, match=r"experts\.0\.gate_proj\.weight and .*up_proj\.weight in types"):
        recipe = Recipe.from_toml(text, "x")
        export_bundle(checkpoint("olmoe"), tmp_path / "mixed", recipe=recipe, options=NATIVE)
    assert list(tmp_path.iterdir()) == [out]


def test_weights_beyond_float16_are_refused_for_fp16(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    path = tmp_path / "large"
    import shutil

    shutil.copytree(checkpoint("fox"), path)
    with Checkpoint.open(path) as opened:
        tensors = {name: opened.read_float32(name).copy() for name in opened.tensors}
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e5
    save_file(tensors, path / "model.safetensors")
    assert load_file(path / "model.safetensors")
    options = ExportOptions(golden=SHORT, dtype="fp16")
    with pytest.raises(ExportError, match=r"model\.layers\.1\.mlp\.up_proj\.weight has values beyond float16"):
        export_bundle(path, tmp_path / "bundle", recipe="none", options=options)
