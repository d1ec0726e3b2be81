"""Does the parity check of the library find what Python's finds: the same checks, values, texts and diagnosis?"""

from __future__ import annotations

import ctypes
import json
import math
import runpy
import shutil
import zipfile
from collections.abc import Callable, Iterator
from ctypes import byref, c_char_p, c_int, c_int64, c_size_t, c_void_p
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pytest

from edgelm.parity.check import check_parity

ROOT = Path(__file__).parents[2]
PROGRESS = ctypes.CFUNCTYPE(c_int, c_void_p, c_char_p, c_int64, c_int64)
TOLERANCE = 1e-6
"""Relative. Sums are made in another order, in float64."""


def parity(bundle: Path, **options: Any) -> dict[str, Any]:
    """Return the library's report."""
    if "on_progress" in options:
        options["on_progress"] = ctypes.cast(options["on_progress"], c_void_p)
    given = harness.sized(harness.ParityOptions, onnxruntime=harness.onnxruntime(), threads=2, **options)
    passed, report, size = c_int(-1), c_void_p(), c_size_t()
    harness.call("edgelm_parity", str(bundle).encode(), byref(given), byref(passed), byref(report), byref(size))
    text = ctypes.string_at(report, size.value).decode()
    harness.library().edgelm_free(report)
    found: dict[str, Any] = json.loads(text)
    assert found["passed"] == bool(passed.value)
    return found


def differences(found: Any, expected: Any, path: str = "") -> Iterator[str]:
    """Yield where two documents differ; of numbers, by more than the tolerance."""
    if type(found) is not type(expected):
        yield f"{path}: {found!r:.200}, in Python {expected!r:.200}"
    elif isinstance(found, dict):
        if list(found) != list(expected):
            yield f"{path}: {list(found)}, in Python {list(expected)}"
        for key in found.keys() & expected.keys():
            yield from differences(found[key], expected[key], f"{path}.{key}")
    elif isinstance(found, list):
        if len(found) != len(expected):
            yield f"{path}: {len(found)} entries, in Python {len(expected)}"
        for index, pair in enumerate(zip(found, expected, strict=False)):
            yield from differences(*pair, f"{path}[{index}]")
    elif isinstance(found, float):
        if not math.isclose(found, expected, rel_tol=TOLERANCE, abs_tol=1e-13):
            yield f"{path}: {found}, in Python {expected}"
    elif found != expected:
        yield f"{path}: {found!r:.200}, in Python {expected!r:.200}"


def same_as_python(bundle: Path, **options: Any) -> dict[str, Any]:
    """Check that both reports are the same but for what differs between two runs; return the library's."""
    found = parity(bundle, **{name: value.encode() for name, value in options.items()})
    expected = json.loads(json.dumps(check_parity(bundle, threads=2, **options).to_dict()))
    version = harness.library().edgelm_version().decode()
    assert [report.pop("made_by") for report in (expected, found)] == [f"edgelm {version}", f"libedgelm {version}"]
    for report in (found, expected):
        assert abs((datetime.now(timezone.utc) - datetime.fromisoformat(report.pop("created"))).total_seconds()) < 600
        assert 1e6 < report.pop("resident_peak") < 1e12
        assert report.pop("speed")["prefill_tokens_per_s"] > 0
        assert 0 < report["device"].pop("memory_available") <= report["device"]["memory_total"]
    assert list(differences(found, expected)) == []
    return found


@pytest.mark.parametrize(
    ("model", "recipe", "ops"),
    [
        ("olmoe", "int4", "native"),
        ("fox", "int8", "native"),
        ("olmoe", "none", "native"),
        ("fox", "int4", "portable"),
        ("olmoe", "int4", "portable"),
    ],
)
def test_the_report_of_a_sound_bundle_is_that_of_python(
    tiny_bundle: Callable[[str, str, str], Path], model: str, recipe: str, ops: str
) -> None:
    report = same_as_python(tiny_bundle(model, recipe, ops))
    assert report["passed"]
    assert report["first_diverged_layer"] is None
    assert {"integrity", "tokenizer.vocabulary", "logits.kl_mean", "greedy.tokens", "layer[0]", "head"} <= {
        check["name"] for check in report["checks"]
    }


def test_limits_are_wide_for_a_cache_coarser_than_the_simulated_one(
    tiny_bundle: Callable[[str, str, str], Path],
) -> None:
    report = same_as_python(tiny_bundle("olmoe", "int4", "native"), kv="int8")
    assert any("limits are wide" in note for note in report["notes"])


def test_a_flipped_bit_is_found_in_its_layer_and_expert(
    tiny_bundle: Callable[[str, str, str], Path], tmp_path: Path
) -> None:
    damage = runpy.run_path(str(ROOT / "examples" / "damage.py"))["damage"]
    damage(tiny_bundle("olmoe", "int4", "native"), tmp_path / "damaged", 2, 7)
    report = same_as_python(tmp_path / "damaged")
    assert not report["passed"]
    assert report["first_diverged_layer"] == 2
    assert report["cause"].startswith("layer 2, expert 7: ")
    assert "(layer 2) differs from what was exported" in report["checks"][0]["detail"]


@pytest.mark.parametrize(
    ("name", "first", "cause"),
    [("model.embed_tokens.weight", -1, "the embedding"), ("layers.1.attn.qkv.weight", 1, "layer 1, attention")],
)
def test_damage_outside_the_experts_is_found_as_in_python(
    tiny_bundle: Callable[[str, str, str], Path], tmp_path: Path, name: str, first: int, cause: str
) -> None:
    bundle = tmp_path / "damaged"
    shutil.copytree(tiny_bundle("fox", "int8", "native"), bundle)
    tensors = json.loads((bundle / "manifest.json").read_text())["tensors"]
    tensor = next(entry for entry in tensors if entry["name"] == name)
    with (bundle / "model.onnx.data").open("r+b") as file:
        file.seek(tensor["offset"] + tensor["size"] // 4)
        file.write(bytes(tensor["size"] // 4))
    report = same_as_python(bundle)
    assert report["first_diverged_layer"] == first
    assert report["cause"].startswith(cause)


def test_another_tokenizer_fails_as_in_python(tiny_bundle: Callable[[str, str, str], Path], tmp_path: Path) -> None:
    bundle = tmp_path / "changed"
    shutil.copytree(tiny_bundle("fox", "int8", "native"), bundle)
    path = bundle / "parity" / "pack.json"
    index = json.loads(path.read_text())
    index["prompts"][0]["text"] += "s"
    index["prompts"][1]["text"] = "another text"
    index["prompts"][2]["decoded"] = "another text"
    index["tokenizer"]["sha256"] = "0" * 64
    path.write_text(json.dumps(index))
    (bundle / "manifest.json").write_text(sizes_updated(bundle))
    checks = {check["name"]: check for check in same_as_python(bundle)["checks"]}
    assert checks["tokenizer.encode"]["detail"].startswith("other ids for: ")
    assert index["prompts"][1]["name"] in checks["tokenizer.encode"]["detail"]
    assert checks["tokenizer.decode"]["detail"] == f"other text for: {index['prompts'][2]['name']}"
    assert not checks["tokenizer.vocabulary"]["passed"]


def test_layers_can_be_left_out_and_the_check_cancelled(tiny_bundle: Callable[[str, str, str], Path]) -> None:
    bundle = tiny_bundle("fox", "int8", "native")
    seen: list[tuple[str, int, int]] = []

    def watch(_: int, what: bytes, done: int, total: int) -> int:
        seen.append((what.decode(), done, total))
        return 0

    report = parity(bundle, skip_layers=1, on_progress=PROGRESS(watch))
    assert report["diagnosis"] is None
    assert report["notes"] == ["layers were not compared, only logits, as was asked for"]
    assert not any(check["name"].startswith("layer") for check in report["checks"])
    assert list(dict.fromkeys(what for what, _, _ in seen)) == ["verifying", "running the graph"]
    for what in ("verifying", "running the graph"):
        steps = [(done, total) for name, done, total in seen if name == what]
        assert steps == sorted(steps)
        assert steps[-1][0] == steps[-1][1] > steps[0][0] == 0
    for what in (b"verifying", b"running the graph", b"tracing the layers"):
        cancel = PROGRESS(lambda _, now, done, total, what=what: int(now == what))
        with pytest.raises(harness.Error, match="cancelled") as error:
            parity(bundle, on_progress=cancel)
        assert error.value.code == "CANCELLED"


def rewrite(folder: Path, compression: int, level: int | None = None, **changed: np.ndarray) -> None:
    """Write the pack's arrays again, and the index to fit."""
    with np.load(folder / "pack.npz") as archive:
        arrays = dict(archive) | changed
    with zipfile.ZipFile(folder / "pack.npz", "w", compression, compresslevel=level) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
    index = json.loads((folder / "pack.json").read_text())
    index["arrays"] = {name: {"shape": list(array.shape), "dtype": array.dtype.name} for name, array in arrays.items()}
    (folder / "pack.json").write_text(json.dumps(index))


def test_packs_are_read_however_they_are_compressed(
    tiny_bundle: Callable[[str, str, str], Path], tmp_path: Path
) -> None:
    source = tiny_bundle("fox", "int8", "native")
    expected = parity(source, skip_layers=1)["checks"][1:]
    for number, (compression, level) in enumerate(
        [(zipfile.ZIP_STORED, None), (zipfile.ZIP_DEFLATED, 9), (zipfile.ZIP_DEFLATED, 0)]
    ):
        bundle = tmp_path / str(number)
        shutil.copytree(source, bundle)
        rewrite(bundle / "parity", compression, level)
        (bundle / "manifest.json").write_text(sizes_updated(bundle))
        assert parity(bundle, skip_layers=1)["checks"][1:] == expected


def sizes_updated(bundle: Path) -> str:
    """Return the manifest with the sizes of the files as they are now."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    for name, info in manifest["files"].items():
        info["size"] = (bundle / name).stat().st_size
    return json.dumps(manifest)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a: {"ids": a["ids"] + 100000}, "token ids beyond the vocabulary of"),
        (lambda a: {"reference.gap": a["reference.gap"] * np.float32(np.nan)}, "values that are not finite"),
        (lambda a: {"ids": a["ids"].astype(np.int64)}, "array 'ids' is not what pack.json says"),
        (lambda a: {"reference.norms": a["reference.norms"][:-1]}, "belongs to another model|has shape"),
    ],
)
def test_a_pack_that_does_not_fit_is_refused_as_in_python(
    tiny_bundle: Callable[[str, str, str], Path],
    tmp_path: Path,
    change: Callable[[Any], dict[str, np.ndarray]],
    said: str,
) -> None:
    bundle = tmp_path / "changed"
    shutil.copytree(tiny_bundle("fox", "int8", "native"), bundle)
    with np.load(bundle / "parity" / "pack.npz") as archive:
        changed = change(archive)
    rewrite(bundle / "parity", zipfile.ZIP_DEFLATED, **changed)
    (bundle / "manifest.json").write_text(sizes_updated(bundle))
    with pytest.raises(harness.Error, match=said) as error:
        parity(bundle)
    assert error.value.code == "BUNDLE"
    with pytest.raises(Exception, match=said):
        check_parity(bundle)
