"""Does an export build engines with our plugin in every layer, and does the bundle describe them correctly?"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from edgelm.bundle import Bundle
from edgelm.cli.main import cli
from edgelm.errors import BundleError, EdgeLMError, ExportError
from edgelm.runtimes.cuda import planning
from edgelm.runtimes.tensorrt import build as building
from edgelm.runtimes.tensorrt.build import build_bundle
from edgelm.runtimes.tensorrt.builder import BuildOptions
from edgelm.runtimes.tensorrt.engine_info import engine_lines, engines, plugins_in
from edgelm.runtimes.tensorrt.library import Library

RECIPES = ("none", "int8", "fp8")


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("checkpoint", ["olmoe-tiny", "fox-tiny"])
def test_an_export_has_one_engine_for_all_devices_with_our_plugins_in_every_layer(export, checkpoint, recipe) -> None:
    bundle = export(checkpoint, recipe)
    (info,) = engines(bundle)
    assert (info.edition, info.sms, info.kv) == ("tensorrt-rtx", (86, 89, 120), bundle.manifest.graph.kv_dtype)
    layers = bundle.manifest.model.num_layers
    names = {(spec.op, spec.name) for spec in plugins_in(bundle.file(info.file))}
    for i in range(layers):
        assert ("GroupQueryAttention", f"layers.{i}.attn") in names
        if checkpoint == "olmoe-tiny":
            assert ("SparseMoE", f"layers.{i}.moe") in names
    assert info.operators["GroupQueryAttention"] == layers
    # Float matmuls are the engine's; all quantised ones and the head are plugins.
    dense = 2 * layers if checkpoint == "olmoe-tiny" else 4 * layers
    assert info.operators["QuantLinear"] == 1 + (0 if recipe == "none" else dense)
    assert bundle.manifest.files.keys() >= {info.file, info.library}
    assert bundle.verify() == []


@pytest.mark.parametrize("sm", [86, 89, 120])
def test_an_engine_for_one_device(copied: Bundle, sm: int) -> None:
    info = build_bundle(copied, BuildOptions((sm,), max_batch=2, chunk=64))
    assert info.sms == (sm,)
    assert (info.max_batch, info.chunk) == (2, 64)
    again = Bundle.open(copied.path)
    assert {found.sms for found in engines(again)} == {(sm,), (86, 89, 120)}
    assert again.verify() == []
    rebuilt = build_bundle(again, BuildOptions((sm,)))
    assert rebuilt.file != info.file
    again = Bundle.open(copied.path)
    assert [found.file for found in engines(again) if found.sms == (sm,)] == [rebuilt.file]
    assert not again.file(info.file).exists()
    assert again.verify() == []
    assert sorted(path.name for path in copied.path.iterdir() if "partial" in path.name) == []


def test_weights_can_be_streamed_if_asked(copied: Bundle) -> None:
    info = build_bundle(copied, BuildOptions((86,), weight_streaming=True))
    assert info.weight_streaming
    assert any("--weight-memory" in line for line in engine_lines(info, Bundle.open(copied.path)))


def test_an_engine_holds_each_weight_once(export) -> None:
    """Two profiles and three devices share the weights."""
    bundle = export("fox-tiny", "int8")
    (info,) = engines(bundle)
    weights = bundle.manifest.files[bundle.manifest.graph.weights_file].size
    assert bundle.manifest.files[info.file].size < weights + (1 << 20)


def run(*arguments: object):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def test_the_command_builds_and_inspect_says_what_is_needed(copied: Bundle) -> None:
    built = run("build", copied.path, "--sm", "89", "--json")
    assert built.exit_code == 0, built.output
    document = json.loads(built.stdout)
    assert document["sms"] == [89]
    plain = run("build", copied.path, "--sm", "120")
    assert plain.exit_code == 0, plain.output
    assert "built in " in plain.stderr
    assert "engines/rtx-1.7.1-sm120.engine: SM 120" in plain.stderr
    said = run("inspect", copied.path).stdout
    assert "engines/rtx-1.7.1-sm89.engine: SM 89" in said
    (built,) = {path.name for path in (copied.path / "engines").glob("*.so")}
    assert f"needs TensorRT-RTX 1.7.1.116 and its plugins, engines/{built}" in " ".join(said.split())
    listed = json.loads(run("inspect", copied.path, "--json").stdout)["engines"]
    assert [entry["file"] for entry in listed] == [info.file for info in engines(Bundle.open(copied.path))]
    assert all(entry["bytes"] > 0 and entry["library"] == f"engines/{built}" for entry in listed)


def test_the_library_of_plugins_can_be_in_the_engine_too(copied: Bundle) -> None:
    built = run("build", copied.path, "--sm", "89", "--embed-plugins")
    assert built.exit_code == 0, built.output
    assert "and permission to run the plugins inside it" in " ".join(built.stderr.split())
    bundle = Bundle.open(copied.path)
    (info,) = [info for info in engines(bundle) if info.sms == (89,)]
    assert info.plugins == "embedded"
    assert bundle.file(info.library).read_bytes() in bundle.file(info.file).read_bytes()


def test_a_library_stays_while_an_engine_needs_it(copied: Bundle, monkeypatch, tmp_path: Path) -> None:
    (first,) = engines(copied)
    other = tmp_path / "other.so"  # as that of another version of EdgeLM
    other.write_bytes(planning.library_path().read_bytes() + bytes(1000))
    monkeypatch.setenv(planning.LIBRARY_VARIABLE, str(other))
    second = build_bundle(copied, BuildOptions((86,)))
    assert second.library != first.library
    assert {path.name for path in (copied.path / "engines").glob("*.so")} == {
        Path(info.library).name for info in (first, second)
    }
    build_bundle(Bundle.open(copied.path), BuildOptions((86, 89, 120)))
    assert [path.name for path in (copied.path / "engines").glob("*.so")] == [Path(second.library).name]
    assert Bundle.open(copied.path).verify() == []


def test_a_bundle_without_engines_says_how_to_get_one(copied: Bundle, tmp_path: Path) -> None:
    shutil.rmtree(copied.path / "engines")
    manifest = json.loads((copied.path / "manifest.json").read_text())
    manifest["files"] = {name: info for name, info in manifest["files"].items() if not name.startswith("engines/")}
    (copied.path / "manifest.json").write_text(json.dumps(manifest))
    assert f"none: `edgelm build {copied.path}` adds one" in " ".join(run("inspect", copied.path).stdout.split())


@pytest.mark.parametrize("sm", [87, 90, 110])
def test_for_devices_of_full_tensorrt_the_error_says_so(copied: Bundle, sm: int) -> None:
    result = run("build", copied.path, "--sm", sm)
    assert result.exit_code == 1
    assert f"not for SM {sm}: for these full TensorRT builds on the device itself" in result.output


def test_fp8_matmuls_are_not_built_for_devices_without_them(copied: Bundle) -> None:
    path = copied.path / building.RECIPE_FILE
    # The file must keep its size, which is checked when the bundle is opened.
    path.write_text(path.read_text().replace('"fp8": false', '"fp8": true '))
    with pytest.raises(ExportError, match="has FP8 matmuls, which SM 86 does not support: export the bundle again"):
        build_bundle(copied, BuildOptions((86, 89)))


def test_what_is_damaged_or_missing_is_named(copied: Bundle) -> None:
    graph = copied.path / building.GRAPH_FILE
    whole = graph.read_bytes()
    with pytest.raises(BundleError, match="has 100 bytes, the manifest says"):
        graph.write_bytes(whole[:100])
        build_bundle(copied, BuildOptions((86,)))
    graph.write_bytes(whole[:100] + b"\xff" * (len(whole) - 100))
    with pytest.raises(ExportError, match=r"TensorRT-RTX 1.7.1.116 cannot read model.tensorrt.onnx: \S"):
        build_bundle(copied, BuildOptions((86,)))
    graph.write_bytes(whole)
    recipe = copied.path / building.RECIPE_FILE
    recipe.write_text("{}".ljust(recipe.stat().st_size))
    with pytest.raises(BundleError, match=r"model.tensorrt.json: format is missing, .*: export the bundle again"):
        build_bundle(copied, BuildOptions((86,)))
    assert sorted(path.name for path in copied.path.iterdir() if "partial" in path.name) == []


def test_a_bundle_stays_whole_when_a_build_fails(copied: Bundle, rtx: Library, monkeypatch) -> None:
    before = (copied.path / "manifest.json").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(building.rowmajor, "write", full)
    with pytest.raises(EdgeLMError, match=r"the disk is full while writing .*engine"):
        build_bundle(copied, BuildOptions((86,)))
    assert (copied.path / "manifest.json").read_bytes() == before
    assert Bundle.open(copied.path).verify() == []
    assert sorted(path.name for path in copied.path.iterdir() if "partial" in path.name) == []


def test_a_bundle_for_another_target_has_no_engines(copied: Bundle) -> None:
    manifest = json.loads((copied.path / "manifest.json").read_text())
    (copied.path / "manifest.json").write_text(json.dumps({**manifest, "target": "cpu"}))
    result = run("build", copied.path)
    assert result.exit_code == 1
    assert "was exported for cpu, and engines need a bundle that was exported with --target tensorrt" in result.output
