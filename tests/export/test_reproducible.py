"""Are two exports of one checkpoint equal byte for byte, whatever the threads, the folders and the hash seed?"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import OPERATOR_SETS, MakeCheckpoint

import edgelm
from edgelm.bundle import Bundle
from edgelm.cli.inspect import bundle_rows
from edgelm.errors import ExportError
from edgelm.export import ExportOptions, export_bundle
from edgelm.parity.golden import GoldenOptions
from edgelm.parity.prompts import Prompt

IMPORT_ROOT = Path(edgelm.__file__).parents[1]
CHECKPOINTS = Path(__file__).parents[2] / "examples" / "checkpoints"
SCRIPT = """
import sys
from edgelm.export import ExportOptions, export_bundle
from edgelm.parity.golden import GoldenOptions
from edgelm.parity.prompts import Prompt
folder, threads, *cases = sys.argv[1:]
golden = GoldenOptions(prompts=(Prompt("a", "def merge(left, right):"), Prompt("b", "import os")), greedy_tokens=4)
for case in cases:
    source, recipe, target, ops = case.split()
    options = ExportOptions(target=target, ops=ops, threads=int(threads), golden=golden)
    export_bundle(f"{folder}/checkpoints/{source}", f"{folder}/bundles/{case}", recipe=recipe, options=options)
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


CASES = (f"olmoe-tiny int4 cpu {OPERATOR_SETS[0]}", "fox-tiny int8 cpu portable", "olmoe-tiny int4 cuda auto")


def export_elsewhere(folder: Path, threads: int, **environment: str) -> dict[str, bytes]:
    """Export in another process, from copies of the checkpoints in `folder`."""
    shutil.copytree(CHECKPOINTS, folder / "checkpoints")
    # -P keeps the tests folder out of the path; the import tree is that of this process.
    done = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT, str(folder), str(threads), *CASES],
        env={**os.environ, "PYTHONPATH": str(IMPORT_ROOT), **environment},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return contents(folder / "bundles")


def test_threads_folders_and_hash_seeds_change_no_byte(tmp_path: Path) -> None:
    one = export_elsewhere(tmp_path / "one", 1, OMP_NUM_THREADS="1", PYTHONHASHSEED="1", TZ="UTC")
    two = export_elsewhere(
        tmp_path / "second place", 2, OMP_NUM_THREADS="2", PYTHONHASHSEED="2", MKL_NUM_THREADS="2",
        OPENBLAS_NUM_THREADS="2", TZ="Asia/Tokyo",
    )  # fmt: skip
    assert set(one) == set(two)
    assert [name for name in one if one[name] != two[name]] == []
    assert all(f"{case}/parity/pack.npz" in one for case in CASES)


GOLDEN = GoldenOptions(prompts=(Prompt("a", "def f(x):"),), greedy_tokens=2)


def test_a_quantised_checkpoint_and_its_bundle_are_equal(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    from edgelm.quant.checkpoint import quantize_checkpoint
    from edgelm.quant.recipe import Recipe

    source = checkpoint("fox")
    before = torch.get_num_threads()
    made = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            folder = tmp_path / str(threads)
            quantize_checkpoint(source, folder / "q", Recipe.load("int4"))
            export_bundle(folder / "q", folder / "b", options=ExportOptions(threads=threads, golden=GOLDEN))
            made.append(contents(folder))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert [name for name in made[0] if made[0][name] != made[1][name]] == []
    assert set(made[0]) == set(made[1])


def test_the_date_is_the_one_that_was_given_or_none(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint("fox")
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    bundle = export_bundle(source, tmp_path / "none", options=ExportOptions(golden=GOLDEN))
    assert bundle.manifest.created is None
    assert "created" not in json.loads((bundle.path / "manifest.json").read_text())
    assert "made" not in dict(bundle_rows(bundle, []))["bundle"]
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    bundle = export_bundle(source, tmp_path / "given", options=ExportOptions(golden=GOLDEN))
    assert bundle.manifest.created == "2023-11-14T22:13:20+00:00"
    assert Bundle.open(bundle.path).manifest.created == bundle.manifest.created
    assert "made 2023-11-14" in dict(bundle_rows(bundle, []))["bundle"]
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    with pytest.raises(ExportError, match="SOURCE_DATE_EPOCH is 'yesterday': give the seconds since 1970"):
        export_bundle(source, tmp_path / "wrong", options=ExportOptions(golden=GOLDEN))
    assert not (tmp_path / "wrong").exists()
