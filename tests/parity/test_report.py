"""Is the report one self-contained, well-formed file with the results, and is the JSON valid?"""

from __future__ import annotations

import dataclasses
import json
import math
import re

import pytest
from click.testing import CliRunner
from markupsafe import escape

from edgelm.cli.parity import parity, summary
from edgelm.errors import ParityError
from edgelm.parity.check import check_parity
from edgelm.parity.report import render, write_report
from edgelm.parity.result import passed, summary_lines

from . import damage
from .wellformed import parse


@pytest.fixture(scope="module")
def healthy(exported):
    return check_parity(exported("olmoe", "int4"), threads=1)


def test_the_report_is_well_formed_and_fetches_nothing(healthy):
    html = render(healthy)
    page = parse(html)
    assert page.fetched == []
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    for outside in ("http://", "https://", "@import", "url("):
        assert outside not in html
    assert page.tags.count("figure") == 3
    assert "prefers-color-scheme: dark" in html


def test_the_report_has_the_result_the_device_and_the_hashes(healthy):
    html = render(healthy)
    assert "✓ PASSED" in html
    judged = sum(check.passed is not None for check in healthy.checks)
    assert escape(healthy.sentence) in html
    assert f"limits: all {judged} checks passed, with the limits for int4</summary>" in html
    for check in healthy.checks:
        assert escape(check.title) in html
    assert healthy.files["model.onnx.data"]["sha256"] in html
    assert "tokens per second" in html
    assert "instruction sets" in html
    for prompt in healthy.prompts:
        assert f'<td class="long">{prompt.name}</td>' in html


def test_a_failed_report_names_the_layer(copied, tmp_path):
    folder = copied("olmoe", "int4")
    damage.renormalise_routing(folder, layer=1)
    damage.reseal(folder)
    report = check_parity(folder, threads=1)
    file = tmp_path / "report.html"
    write_report(report, file)
    html = file.read_text(encoding="utf-8")
    parse(html)
    assert "✗ FAILED" in html
    assert f"{len(report.failures)} of " in html
    assert "it first differs in layer 1, the MoE block as a whole" in html
    # Each in the folded table, those of layers in theirs too, and the lines of the summary.
    assert html.count("✗ FAIL<") == (
        len(report.failures)
        + sum(check.layer is not None for check in report.failures)
        + sum(line.passed is False for line in summary_lines(report))
    )
    assert html.count(">first difference<") == 2 * 2  # in both layouts of the charts over layers
    assert "First difference:</b> layer 1, the MoE block as a whole" in html
    lines = summary(report).splitlines()
    assert "does NOT compute the same model as the reference: it first differs in layer 1, the MoE" in lines[0]
    assert lines[1] == "Router logits agree."
    assert re.search(
        r"^FAIL  layers        layer 1 adds an error of its own at \d+ of \d+ positions", "\n".join(lines), re.M
    )


def test_names_and_texts_are_escaped_in_the_report(healthy):
    evil = "<script>alert('x')</script>"
    prompt = dataclasses.replace(healthy.prompts[0], name=evil, text=evil, greedy_text=evil)
    report = dataclasses.replace(healthy, prompts=[prompt], bundle=f"/tmp/{evil}", notes=[evil])
    page = parse(render(report))
    assert "script" not in page.tags


def test_nan_results_still_give_a_report(healthy):
    nan = float("nan")
    prompts = [dataclasses.replace(p, kl=[nan] * len(p.kl), kl_float=[nan] * len(p.kl)) for p in healthy.prompts]
    report = dataclasses.replace(healthy, prompts=prompts, kl_mean=nan, perplexity_quantized=0.0)
    parse(render(report))
    assert report.to_dict()["kl_mean"] is None


def test_the_json_document_has_every_number_and_no_nan(healthy):
    text = json.dumps(healthy.to_dict(), allow_nan=False)
    document = json.loads(text)
    assert document["passed"] is True
    assert document["format"] == "edgelm-parity"
    assert {check["name"] for check in document["checks"]} >= {
        "integrity",
        "tokenizer.encode",
        "layer[0]",
        "experts[3]",
    }
    assert len(document["diagnosis"]["layers"]) == document["model"]["num_layers"]
    assert math.isclose(document["kl_mean"], healthy.kl_mean)


def test_the_command_prints_json_and_its_status_is_the_result(exported, copied, tmp_path, monkeypatch):
    good = str(exported("fox", "int4"))
    result = CliRunner().invoke(parity, [good, "--json", "--threads", "1", "--report", str(tmp_path / "r.html")])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["passed"] is True
    assert (tmp_path / "r.html").stat().st_size > 10_000
    folder = copied("fox", "int4")
    tensor = next(name for name in damage.tensor_names(folder) if name.startswith("layers.1.attn.qkv"))
    damage.flip_byte(folder, tensor, 77)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    result = CliRunner().invoke(parity, [str(folder), "--threads", "1"], color=True)
    assert result.exit_code == 1
    assert f"{tensor} (layer 1)" in result.stdout
    red = "\x1b[31m\x1b[1m"
    assert result.stdout.startswith(f"{red}This device does NOT compute the same model")
    assert f"{red}FAIL " in result.stdout
    marks = [line.removeprefix(red)[:4].strip() for line in result.stdout.splitlines()]
    assert marks.index("ok") > max(place for place, mark in enumerate(marks) if mark == "FAIL")


def test_the_command_fails_with_any_single_check(healthy, monkeypatch):
    """For any failed check the exit code is 1 and its line says FAIL; a check without a result does not fail."""
    checks = healthy.checks
    for index, check in enumerate(checks):
        for outcome, code in ((False, 1), (None, 0)):
            changed = [*checks[:index], dataclasses.replace(check, passed=outcome), *checks[index + 1 :]]
            report = dataclasses.replace(healthy, checks=changed, passed=passed(changed))
            monkeypatch.setattr("edgelm.parity.check.check_parity", lambda *_, report=report, **__: report)
            result = CliRunner().invoke(parity, ["b", "--verbose"])
            assert result.exit_code == code, check.name
            brief, _, every = result.stdout.partition("with the limits for")
            assert ("1 of " in brief and "checks FAILED" in brief) == (code == 1)
            assert bool(re.search("^FAIL  ", brief, re.MULTILINE)) == (code == 1), check.name
            failed = [line for line in every.splitlines() if line.startswith("FAIL ")]
            assert any(check.title in line for line in failed) == (code == 1), check.name


def test_kl_in_the_report_equals_that_of_checks_and_curves(healthy):
    """All are KL(reference || device), so the numbers must be equal, up to the order of a sum."""
    by_name = {check.name: check.value for check in healthy.checks}
    assert healthy.kl_mean == by_name["logits.kl_mean"]
    assert healthy.kl_p99 == by_name["logits.kl_p99"]
    assert healthy.kl_max == by_name["logits.kl_max"]
    assert healthy.top1_clear == by_name["logits.top1"]
    assert abs(healthy.perplexity / healthy.perplexity_quantized - 1) == by_name["perplexity.device"]
    assert healthy.float_kl_mean == healthy.float_loss.kl
    assert healthy.quantization_kl_mean == healthy.float_loss.kl_reference
    for name, mean in (("kl", healthy.kl_mean), ("kl_float", healthy.float_kl_mean)):
        curve = [value for prompt in healthy.prompts for value in getattr(prompt, name)]
        assert len(curve) == healthy.positions
        assert math.fsum(curve) / len(curve) == pytest.approx(mean, rel=1e-12)


def test_a_bundle_without_a_pack_is_an_error_not_a_failed_check(copied):
    folder = copied("fox", "int4")
    (folder / "parity" / "pack.json").write_text("not json")
    damage.reseal(folder)
    with pytest.raises(ParityError, match=r"pack\.json"):
        check_parity(folder, threads=1)
