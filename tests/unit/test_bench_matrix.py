"""Does `edgelm bench` measure every combination in turns, say what it leaves out, and keep what was measured?"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from tiny_graph import Shape, write_tiny_model

from edgelm import devices
from edgelm.benchmark import Session
from edgelm.cli.main import cli
from edgelm.comparison.compare import compare
from edgelm.errors import EdgeLMError
from edgelm.measuring.matrix import bench_matrix
from edgelm.measuring.report import labels, render, varying


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("tiny")
    return [write_tiny_model(folder / name, Shape(vocab=512, context=64 * n)).path for n, name in ((1, "a"), (2, "b"))]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["bench", *map(str, arguments), "--new-tokens", "2", "--repeat", "2"])


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The loads and runs of a measurement, in order."""
    found: list[tuple[str, ...]] = []
    first, second = Session.__init__, Session.run

    def init(self: Session, *arguments: object) -> None:
        first(self, *arguments)  # type: ignore[arg-type]
        found.append(("load", self.settings.bundle.path.name))

    def record(self: Session, prompt: int, new: int) -> object:
        found.append(("run", self.settings.bundle.path.name, str(prompt)))
        return second(self, prompt, new)

    monkeypatch.setattr(Session, "__init__", init)
    monkeypatch.setattr(Session, "run", record)
    return found


def test_runs_take_turns_and_the_order_turns_around(bundles: list[Path], steps: list[tuple[str, ...]]) -> None:
    found = bench_matrix(bundles, prompt_tokens=[8, 16], new_tokens=2, repeat=2)
    assert found.together
    assert [step[1] for step in steps if step[0] == "load"] == ["a", "a", "b"]  # once to import the runtime
    round_ = [("run", name, prompt) for name in "ab" for prompt in ("8", "16")]
    assert [step for step in steps if step[0] == "run"] == [*round_, *round_[::-1], *round_]
    assert [(Path(one.bundle).name, one.prompt_tokens) for one in found.results] == [
        ("a", 8), ("a", 16), ("b", 8), ("b", 16)
    ]  # fmt: skip
    assert all(len(one.decode_tokens_per_second.runs) == 2 for one in found.results)


def test_without_memory_for_all_each_repetition_loads_them_in_turn(
    bundles: list[Path], steps: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    scarce = dataclasses.replace(devices.describe(), memory_available=200 << 20)
    monkeypatch.setattr(devices, "describe", lambda: scarce)
    found = bench_matrix(bundles, prompt_tokens=[8], new_tokens=2, repeat=2)
    assert not found.together
    assert re.match(r"together the models need about 2\d\d MB, 210 MB are free", found.notes[0])
    names = [step[1] for step in steps]
    assert names == ["a", *"bbb", *"aaa", *"aaa", *"bbb"]  # each: load, a run that is not counted, one that is
    assert all(len(one.decode_tokens_per_second.runs) == 2 for one in found.results)


def test_what_does_not_fit_or_cannot_be_loaded_is_said(bundles: list[Path]) -> None:
    found = run(*bundles, "--prompt-tokens", "8,100", "--batch", "1,2", "--json")
    assert found.exit_code == 0, found.output
    document = json.loads(found.stdout)
    assert [(Path(one["bundle"]).name, one["prompt_tokens"]) for one in document["results"]] == [
        ("a", 8), ("b", 8), ("b", 100)
    ]  # fmt: skip
    reasons = [(Path(one["bundle"]).name, one["batch"], one["prompt_tokens"]) for one in document["skipped"]]
    assert sorted(reasons, key=str) == [("a", 1, 100), ("a", 2, 100), ("a", 2, None), ("b", 2, None)]
    shown = run(*bundles, "--prompt-tokens", "8,100", "--batch", "1,2").stdout
    line = "a, 100 prompt tokens: not measured: 100 prompt tokens and 2 new ones do not fit into the model's context"
    assert shown.count(line) == 1
    assert "runs one sequence at a time" in shown
    with pytest.raises(EdgeLMError, match="do not fit"):
        bench_matrix(bundles, prompt_tokens=[1000], new_tokens=2)


def test_ctrl_c_keeps_what_was_measured(bundles: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    runs = 0
    original = Session.run

    def interrupted(self: Session, prompt: int, new: int) -> object:
        nonlocal runs
        runs += 1
        if runs == stop:
            raise KeyboardInterrupt
        return original(self, prompt, new)

    monkeypatch.setattr(Session, "run", interrupted)
    stop = 4  # a and b without being counted, b, then a
    found = run(*bundles, "--prompt-tokens", "8")
    assert found.exit_code == 130
    assert "note: interrupted: the figures are those of the runs until then" in found.stdout
    assert re.search(r"^b +[\d.]+ kB +8 +2 ", found.stdout, re.MULTILINE)
    assert "a, 8 prompt tokens: not measured: interrupted before it was measured" in found.stdout
    runs, stop = 0, 2
    assert run(*bundles, "--prompt-tokens", "8").exit_code == 130


def test_one_combination_keeps_its_document_and_compare_reads_both(bundles: list[Path], tmp_path: Path) -> None:
    single = json.loads(run(bundles[0], "--prompt-tokens", "8", "--threads", "1", "--json").stdout)
    assert single["format"] == "edgelm-bench"
    assert single["prompt_tokens"] == 8
    assert set(single["sha256"]) == set(single["files"])
    many = json.loads(run(*bundles, "--prompt-tokens", "8,8", "--json").stdout)
    assert [set(one) for one in many["results"]] == [set(single)] * 2
    for name, document in (("one", single), ("many", many)):
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
    found = compare([tmp_path / "one.json", tmp_path / "many.json"])
    assert len(found.entries) == 3
    assert found.entries[0].speed is not None
    assert found.entries[0].speed.decode == single["decode_tokens_per_second"]["median"]
    assert found.entries[0].export is not None


def test_the_best_bandwidth_of_all_repetitions_counts(bundles: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    measured = iter([1e9, 3e9, 2e9])
    monkeypatch.setattr("edgelm.devices.cache_bytes", lambda: 16)
    monkeypatch.setattr("edgelm.measuring.matrix.memory_bandwidth", lambda threads: next(measured))
    found = bench_matrix(bundles, threads=[1], prompt_tokens=[8], new_tokens=2, repeat=3)
    assert [one.machine_bandwidth for one in found.results] == [3e9, 3e9]
    assert all(one.bandwidth_share for one in found.results)


def test_a_bundle_is_given_once(bundles: list[Path]) -> None:
    found = run(bundles[0], f"{bundles[0]}/")
    assert found.exit_code == 2
    assert "is given twice" in found.stderr


@pytest.mark.parametrize(
    ("option", "value"),
    [("--threads", "1,"), ("--threads", "0"), ("--threads", "1,9999"), ("--kv", "int8,int7"), ("--batch", "a"),
     ("--prompt-tokens", ""), ("--runtime", "none")],
)  # fmt: skip
def test_wrong_lists_are_wrong_usage(bundles: list[Path], option: str, value: str) -> None:
    found = run(bundles[0], option, value)
    assert found.exit_code == 2, found.output


def test_an_error_about_a_list_says_what_to_write(bundles: list[Path]) -> None:
    assert "'int8,' is no list: write for example float32,float16" in run(bundles[0], "--kv", "int8,").stderr
    assert "'1,' is no list: write for example 1,2" in run(bundles[0], "--batch", "1,").stderr
    assert "'x' is not a valid whole number" in run(bundles[0], "--prompt-tokens", "8,x").stderr


def test_what_is_no_bundle_is_refused_with_what_to_give(tmp_path: Path) -> None:
    assert "it has no manifest.json (give the folder that `edgelm export -o` wrote)" in run(tmp_path).stderr
    (tmp_path / "manifest.json").write_text("{}")
    found = run(tmp_path).stderr
    assert found.endswith(
        'of an EdgeLM bundle (no "format": "edgelm-bundle"): give the folder that `edgelm export -o` wrote\n'
    )


def test_one_run_is_not_called_a_median(bundles: list[Path]) -> None:
    found = CliRunner().invoke(cli, ["bench", *map(str, bundles), "--new-tokens", "2", "--repeat", "1"])
    assert "; 1 run\n" in found.stdout


def test_the_page_has_curves_bars_and_what_was_left_out(bundles: list[Path], tmp_path: Path) -> None:
    found = run(*bundles, "--prompt-tokens", "8,16,100", "--threads", "1", "--report", tmp_path / "bench.html")
    assert found.exit_code == 0, found.output
    page = (tmp_path / "bench.html").read_text(encoding="utf-8")
    for word in (
        "Prefill by length of the prompt",
        "Decode after a prompt of this length",
        "Not measured",
        "b, prompt 16",
    ):
        assert word in page, word
    assert "<script" not in page
    single = run(bundles[0], "--prompt-tokens", "8", "--report", tmp_path / "one.html")
    assert single.exit_code == 0, single.output
    assert "This device generates" in (tmp_path / "one.html").read_text(encoding="utf-8")
    assert "lies in the input" in run(bundles[0], "--report", bundles[0] / "manifest.json").stderr


def test_labels_name_what_varies_only(bundles: list[Path]) -> None:
    found = bench_matrix(bundles, threads=[1], prompt_tokens=[8], new_tokens=2, repeat=1)
    assert varying(found.results) == []
    assert labels(found.results) == ["a", "b"]
    other = dataclasses.replace(found.results[1], threads=2, prompt_tokens=9, bundle="/other/a")
    assert labels([found.results[0], other]) == [f"{bundles[0]}, 1 thread, prompt 8", "/other/a, 2 threads, prompt 9"]
    evil = dataclasses.replace(found.results[0], bundle="/x/<b>\u202e", model="<i>")
    page = render(dataclasses.replace(found, results=(evil, *found.results)))
    assert "<b>\u202e" not in page
    assert "<i>" not in page
