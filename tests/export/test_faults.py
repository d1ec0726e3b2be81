"""Is there always a complete output, old or new, wherever a run is killed, and does the next run clean up?"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tiny_models import FOX

from edgelm.bundle import Bundle
from edgelm.checkpoint import Checkpoint
from edgelm.checkpoint.written import FILE_LIST
from edgelm.errors import EdgeLMError
from edgelm.export import ExportOptions, export_bundle
from edgelm.output_paths import OutputKind
from edgelm.parity.golden import GoldenOptions
from edgelm.parity.prompts import Prompt
from edgelm.quant import PRESETS
from edgelm.quant.checkpoint import quantize_checkpoint
from edgelm.synth import write_random_checkpoint

sys.path.insert(0, str(Path(__file__).parents[1]))
from faults import AFTER, BEFORE, KILL, MODES, can_exchange, interrupted_at, operations

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

ANY = OutputKind("anything", lambda place: None)
SMALL = {**FOX, "vocab_size": 320, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
OUTCOME = {KILL: "killed", BEFORE: "interrupted", AFTER: "interrupted"}
EXCHANGES = (True, False)


@pytest.fixture(autouse=True)
def forked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use one thread, since a forked OpenMP pool hangs, and no fsync, for speed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(SMALL, tmp_path_factory.mktemp("small") / "fox")


def exporting(checkpoint: Path, out: Path, recipe: str) -> Bundle:
    golden = GoldenOptions(prompts=(Prompt("short", "a"),), greedy_tokens=1, max_prompt_tokens=2)
    options = ExportOptions(golden=golden, ops="portable", threads=1, overwrite=True)
    return export_bundle(checkpoint, out, recipe=recipe, options=options)


@pytest.fixture(scope="module")
def bundles(small: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Bundle]:
    folder = tmp_path_factory.mktemp("bundles")
    return exporting(small, folder / "int8", "int8"), exporting(small, folder / "none", "none")


def strike(
    out: Path,
    new: Callable[[], object],
    old: Callable[[], object],
    check: Callable[[], str],
    points: Callable[[list[str]], list[int]],
    exchange: bool,
    modes: tuple[str, ...] = MODES,
) -> int:
    """Interrupt the replacement of an old output at every chosen operation; return the number of interruptions.

    `check` returns "old" or "new", and fails if the output is not complete.
    """
    old()
    assert check() == "old"
    log = operations(new, exchange=exchange)
    assert check() == "new"
    old()
    count = 0
    for at in points(log):
        for mode in modes:
            met = interrupted_at(new, at, mode, exchange=exchange)
            assert met in (OUTCOME[mode], 0), f"operation {at} ({log[at]}), {mode}: {met}"
            try:
                found = check()
            except EdgeLMError as error:
                pytest.fail(f"operation {at} ({log[at]}), {mode}: {error}")
            assert found in ("old", "new")
            # Ctrl-C leaves nothing, except the lock file if it was being made or removed.
            left = sorted(path.name for path in out.parent.iterdir())
            if mode != KILL:
                assert set(left) <= {out.name, f".{out.name}.edgelm-lock"}, f"operation {at} ({log[at]}), {mode}"
            old()
            assert sorted(path.name for path in out.parent.iterdir()) == [out.name], f"operation {at} ({log[at]})"
            assert check() == "old"
            count += 1
    return count


def sampled(of: int) -> Callable[[list[str]], list[int]]:
    """Return every operation that publishes or cleans up, and some of those inside the unfinished output."""

    def points(log: list[str]) -> list[int]:
        bulk = [at for at, what in enumerate(log) if what.startswith(("create", "write", "pwrite", "fsync", "open"))]
        return sorted({*range(len(log))} - {at for i, at in enumerate(bulk) if i % of and at != bulk[-1]})

    return points


def bundle_at(out: Path, old: str) -> Callable[[], str]:
    def check() -> str:
        bundle = Bundle.open(out)
        assert bundle.verify() == []
        here = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
        assert here == {*bundle.manifest.files, "manifest.json"}
        return "old" if bundle.manifest.recipe.name == old else "new"

    return check


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_a_bundle_is_complete_wherever_a_run_ends(
    bundles: tuple[Bundle, Bundle], tmp_path: Path, exchange: bool
) -> None:
    """Tests the operations of `Bundle.install`, which publishes like an export, with real bundles."""
    out = tmp_path / "place" / "b"
    assert can_exchange(tmp_path) or not exchange, "this file system cannot exchange names"
    count = strike(
        out,
        lambda: bundles[1].install(out, overwrite=True),
        lambda: bundles[0].install(out, overwrite=True),
        bundle_at(out, "int8"),
        sampled(8),
        exchange,
        modes=(KILL, AFTER),
    )
    print(f"{count} faults")
    assert count > 60


def test_an_export_leaves_a_complete_bundle_wherever_it_ends(
    small: Path, bundles: tuple[Bundle, Bundle], tmp_path: Path
) -> None:
    """Tests a sample of all operations; those of publishing are as in `Bundle.install`."""
    out = tmp_path / "place" / "b"
    count = strike(
        out,
        lambda: exporting(small, out, "none"),
        lambda: bundles[0].install(out, overwrite=True),
        bundle_at(out, "int8"),
        lambda log: list(range(0, len(log), 5)),
        True,
        modes=(KILL, AFTER),
    )
    print(f"{count} faults")
    assert count > 30


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_a_quantised_checkpoint_is_complete_wherever_a_run_ends(small: Path, tmp_path: Path, exchange: bool) -> None:
    out = tmp_path / "place" / "q"

    def quantise(recipe: str) -> None:
        quantize_checkpoint(small, out, PRESETS[recipe], threads=1, overwrite=True)

    def check() -> str:
        with Checkpoint.open(out) as opened:
            for name in opened.tensors:
                opened.read_raw(name)
            text = opened.config["quantization_config"]["recipe"]
        assert (out / FILE_LIST).is_file()
        return "old" if text == PRESETS["int8"].to_toml() else "new"

    count = strike(out, lambda: quantise("int4"), lambda: quantise("int8"), check, sampled(8), exchange, (KILL, AFTER))
    print(f"{count} faults")
    assert count > 40
