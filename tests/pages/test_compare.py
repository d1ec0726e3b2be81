"""Are reports of several devices read and compared correctly, and is everything else refused by name?"""

from __future__ import annotations

import copy
import json
import re

import pytest
from click.testing import CliRunner

from edgelm.cli.main import cli
from edgelm.comparison.compare import compare
from edgelm.comparison.report import render
from edgelm.errors import ReportError

from . import samples


@pytest.fixture
def write(tmp_path):
    """Function (name, report, changed fields) that writes a report and returns its path."""

    def put(name, report, **changes):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({**copy.deepcopy(report), **changes}))
        return path

    return put


def run(*arguments):
    return CliRunner().invoke(cli, ["compare", *map(str, arguments)])


PASSED = samples.parity().to_dict()
FAILED = samples.parity(failed={"logits.kl_mean", "layer[1]"}, first=1).to_dict()
OTHER = {**samples.DEVICE, "cpu": "Cortex-A76"}


def test_the_answer_says_who_passed_and_whether_the_weights_are_the_same(write):
    found = compare([write("laptop", PASSED), write("pi5", FAILED, device=OTHER)])
    assert found.passed is False
    assert found.sentences[0] == "1 of 2 parity reports FAILED: pi5 (layer 1)."
    assert re.fullmatch(r"The weights are the same in all reports \(SHA-256 [0-9a-f]{12}\)\.", found.sentences[1])
    assert compare([write("a", PASSED)]).sentences[0].startswith("1 parity report passed")


def test_other_weights_are_said_plainly(write):
    files = {"model.onnx.data": {"size": 2_723_840, "sha256": "f" * 64}}
    found = compare([write("a", PASSED), write("b", PASSED, files=files), write("c", PASSED, files={})])
    assert re.match(r"The weights are NOT the same \(a: [0-9a-f]{12}; b: [0-9a-f]{12}\)", found.sentences[1])
    assert found.sentences[1].endswith("Not known for c: the report has no hash.")
    assert found.to_dict()["same_weights"] is None
    damaged = samples.parity(failed={"integrity"}).to_dict()
    said = compare([write("a", PASSED), write("d", damaged)]).sentences
    assert said[0] == "1 of 2 parity reports FAILED: d (the bundle's files are damaged)."
    assert said[1].endswith("On d the files are not those that the hash is of.")


def test_other_files_of_the_same_weights_differ(write):
    more = {**PASSED["files"], "config.json": {"size": 1, "sha256": "a" * 64}}
    found = compare([write("a", PASSED), write("b", PASSED, files=more)]).to_dict()
    assert found["same_weights"] is True
    assert set(found["differs"]) == {"All files, SHA-256"}


def test_settings_are_the_same_or_differ(write):
    old = {key: value for key, value in PASSED.items() if key != "isa"}
    found = compare([write("a", PASSED), write("b", old, threads=4, kv="int8", device=OTHER)]).to_dict()
    assert found["differs"]["Threads"] == {"a": "2", "b": "4"}
    assert found["differs"]["CPU"] == {"a": "AMD EPYC", "b": "Cortex-A76"}
    assert found["differs"]["KV cache"] == {"a": "float16", "b": "int8"}
    assert "Kernels" not in {**found["differs"], **found["same"]}  # one report lacks it: nothing to compare
    assert found["same"]["Recipe"] == "int4"


def test_a_benchmark_joins_the_parity_report_of_the_same_device_bundle_and_settings(write):
    bench = samples.bench_document()
    paths = [write("b", bench), write("pi5", PASSED, device=OTHER), write("a", PASSED)]
    found = compare(paths)
    assert found.names == ["pi5", "a"]
    assert [entry.speed.decode for entry in found.entries] == [3850.0, bench["decode_tokens_per_second"]["median"]]
    assert found.entries[1].memory == bench["resident_peak"]
    assert "speed and memory of a are from b.json" in found.notes
    for name, value in (("threads", 4), ("runtime", "cuda-kernels"), ("device", OTHER), ("files", {"x": 1})):
        assert compare([write("b", {**bench, name: value}), write("a", PASSED)]).names == ["b", "a"], name


def test_of_two_equal_boards_each_gets_its_own_benchmark(write):
    first, second = samples.bench_document(), samples.bench_document()
    second["decode_tokens_per_second"] = {"median": 7.0, "low": 7.0, "high": 7.0}
    found = compare([write("a", PASSED), write("b", PASSED), write("x", first), write("y", second)])
    assert [entry.speed.decode for entry in found.entries] == [first["decode_tokens_per_second"]["median"], 7.0]


def test_results_of_several_bundles_are_columns_of_their_own(write):
    one = samples.bench_document()
    many = {"format": "edgelm-bench", "format_version": 1, "results": [one, {**one, "prompt_tokens": 128}]}
    found = compare([write("m", many)])
    assert found.names == ["m: olmoe-int4, 2 threads, 64 tokens", "m: olmoe-int4, 2 threads, 128 tokens"]
    assert found.passed is None
    assert run(write("m", many)).exit_code == 0


def test_the_exit_code_tells_whether_all_passed(write):
    assert run(write("a", PASSED), write("b", PASSED, device=OTHER)).exit_code == 0
    found = run(write("a", PASSED), write("b", FAILED))
    assert found.exit_code == 1
    assert "FAILED: layer 1" in found.stdout
    assert found.stderr == ""


def test_ratios_refer_to_the_base(write):
    a, b = write("a", PASSED), write("b", PASSED, speed={**PASSED["speed"], "decode_tokens_per_s": 1925.0})
    for base in ("a", str(a)):
        found = json.loads(run(a, b, "--base", base, "--json").stdout)
        assert found["base"] == "a"
        assert found["reports"][1]["ratios"]["decode_tokens_per_second"] == 0.5
        assert found["reports"][0]["ratios"] == {}
    assert "1,925 (0.50x)" in run(a, b, "--base", "a").stdout
    assert compare([b], base=str(a)).names == ["a", "b"]  # a file that is not among the reports comes first
    for base in ("c", ""):
        assert f"there is no report {base!r} to compare with" in run(a, b, "--base", base).stderr


def test_reports_are_named_by_the_option_the_file_or_its_folder(tmp_path, write):
    paths = []
    for folder in ("pi4", "pi5"):
        (tmp_path / folder).mkdir()
        paths.append(tmp_path / folder / "parity.json")
        paths[-1].write_text(json.dumps(PASSED))
    assert compare(paths).names == ["pi4/parity", "pi5/parity"]
    assert compare(paths, ["old"]).names == ["old", "parity"]
    for names in (["x", "x"], [" "], ["a", "b", "c"]):
        found = run(*paths, *(part for name in names for part in ("--name", name)))
        assert found.exit_code == 2, found.output


def test_the_same_file_twice_is_wrong_usage(tmp_path, write):
    path = write("a", PASSED)
    (tmp_path / "link.json").symlink_to(path)
    for other in (path, tmp_path / "link.json", tmp_path / "." / "a.json"):
        found = run(path, other)
        assert found.exit_code == 2
        assert "is given twice" in found.stderr
    assert "a and b are the same report" in compare([path, write("b", PASSED)]).notes


TEXT = json.dumps(PASSED)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is empty"),
        (b"hello", "not valid JSON"),
        (TEXT[: len(TEXT) // 2].encode(), "not valid JSON"),
        (b"\x80abc", "is no text"),
        (b"[]", "holds no report"),
        (b'{"a": 1}', "is no report of a parity check or of a benchmark"),
        (b'{"format": "edgelm-eval"}', "it is of the format 'edgelm-eval'"),
        (TEXT.replace('"kl_mean": ', '"kl_mean": NaN, "x": ').encode(), "NaN is not a number"),
        (TEXT.replace('"kl_mean": ', '"kl_mean": 1e999, "x": ').encode(), "too large"),
        (b'{"format": "edgelm-bench", "results": []}', "has no result"),
    ],
)  # fmt: skip
def test_what_is_no_report_is_refused_with_the_reason(tmp_path, content, problem):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    found = run(path)
    assert found.exit_code == 1
    assert found.stderr.startswith(f"edgelm: error: {path}: ")
    assert problem in found.stderr
    assert found.stderr.count("\n") == 1


def test_every_required_field_is_named_where_it_is_missing(write):
    required = {"bundle", "passed", "checks", "kl_mean", "float_loss", "top1", "first_diverged_layer", "cause",
                "diagnosis", "speed", "threads", "runtime", "device", "model", "recipe", "source", "files",
                "tools"}  # fmt: skip
    for name in PASSED:
        path = write("a", {key: value for key, value in PASSED.items() if key != name})
        if name in required:
            with pytest.raises(ReportError, match=rf"a\.json: {name} is missing"):
                compare([path])
        elif name != "format":
            compare([path])
    with pytest.raises(ReportError, match=r"a\.json, result 2: prompt_tokens is missing"):
        one = samples.bench_document()
        short = {key: value for key, value in one.items() if key != "prompt_tokens"}
        compare([write("a", {"format": "edgelm-bench", "results": [one, short]})])
    with pytest.raises(ReportError, match=r'threads is "2" \(a string\), expected'):
        compare([write("a", PASSED, threads="2")])


def test_a_report_of_a_newer_version_is_read_with_a_note(write):
    newer = copy.deepcopy({**PASSED, "format_version": 2, "colour": "blue"})
    newer["diagnosis"]["layers"][0]["more"] = {"deep": [1]}
    found = compare([write("a", newer)])
    assert found.passed
    assert "written by a newer EdgeLM (format version 2)" in found.notes[0]


def test_files_of_windows_are_read(tmp_path):
    for encoding in ("utf-16", "utf-8-sig"):
        (tmp_path / "a.json").write_text(TEXT, encoding=encoding)
        assert compare([tmp_path / "a.json"]).passed


def test_hostile_names_reach_neither_the_terminal_nor_the_page(write):
    evil = samples.EVIL.removesuffix("\ud800")
    report = {**PASSED, "recipe": evil, "notes": [evil], "model": {"name": evil}, "source": f"{evil}\n\x1b[2J"}
    path = write("a", report)
    found = run(path, write("b", {**report, "recipe": "int8"}), "--name", evil)
    assert found.exit_code == 0, found.output
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", found.stdout)
    page = render(compare([path], [evil]))
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert not re.search("[\u202e\x07]", page)


def test_the_page_marks_differences_and_failures_with_words(write, tmp_path):
    paths = [write("a", PASSED), write("b", FAILED, device=OTHER, threads=4)]
    out = tmp_path / "c.html"
    assert run(*paths, "-o", out).exit_code == 1
    page = out.read_text(encoding="utf-8")
    assert '<p class="answer fail"><span class="badge">✗ FAILED</span> 1 of 2' in page
    assert re.search(r"Threads</th><td class=\"mark\"><b>≠ differs</b></td>\s<td[^>]*>2</td><td[^>]*>4</td>", page)
    assert re.search(r"Recipe</th><td class=\"mark\">= same</td>", page)
    assert "✓ passed" in page
    assert "0.5, above the limit" in page or "limit 0.006" in page
    assert page.count("<figure>") >= 5
    assert "<script" not in page
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    assert "exists already" in run(*paths, "-o", notes).stderr
    assert notes.read_text() == "mine"
    assert "is the input" in run(*paths, "-o", paths[0]).stderr
