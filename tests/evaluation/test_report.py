"""Do `edgelm eval` and its HTML page show what was measured?"""

from __future__ import annotations

import json
import re
import shutil

import pytest
from click.testing import CliRunner
from parity.wellformed import parse

from edgelm.cli.eval import eval as verb
from edgelm.cli.eval import summary
from edgelm.evaluation import EvalOptions, evaluate
from edgelm.evaluation.report import render
from edgelm.pages.numbers import number

from .conftest import OPS


@pytest.fixture(scope="module")
def report(checkpoint, exported, quantized, text):
    targets = [exported("olmoe", "int4"), quantized("olmoe", "int8"), "int8", "none"]
    kv = ("int8",) if OPS == "native" else ()
    options = EvalOptions(text=text, tokens=256, length=64, layers=True, speed=False, kv=kv)
    return evaluate(targets, checkpoint("olmoe"), options)


def test_the_page_is_complete_and_has_every_target(report):
    html = render(report)
    page = parse(html)
    assert not page.fetched
    assert "script" not in page.tags
    for target in report.targets:
        assert html.count(target.name) >= 2
        assert number(target.kl.mean, 3) in html
    assert report.text.sha256 in html
    for files in (report.reference.files, *(target.files for target in report.targets)):
        assert all(info["sha256"] in html for info in files.values())
    # Frontier, layers, routing; a heat map for each checkpoint or recipe with an error.
    assert page.tags.count("figure") == 3 + 2
    assert "none: every expert is as in the float model" in html
    experts = sum(len(row) for row in report.targets[-1].experts.error)
    assert len(re.findall(r"layer \d+, expert \d+: ", html)) == 2 * experts


def test_names_are_escaped(checkpoint, text, tmp_path):
    folder = tmp_path / "a <b> & c"
    shutil.copytree(checkpoint("fox"), folder)
    report = evaluate([folder], checkpoint("fox"), EvalOptions(text=text, tokens=64, length=64))
    html = render(report)
    parse(html)
    assert "a &lt;b&gt; &amp; c" in html
    assert "<b> &" not in html


def test_the_summary_names_every_target_and_the_worst_experts(report):
    shown = summary(report)
    for target in report.targets:
        assert target.name in shown
    worst = report.targets[-2].experts.worst[0]
    assert f"{worst.layer}.{worst.expert} {worst.error:.3g}" in shown
    assert "float model" in shown
    assert ("over the float32 cache" in shown) == (OPS == "native")


def test_the_verb_prints_json_and_writes_the_page(checkpoint, exported, text, tmp_path):
    page = tmp_path / "report.html"
    command = [str(exported("fox", "int4")), "--checkpoint", str(checkpoint("fox")), "--text", str(text)]
    sizes = ["--tokens", "128", "--length", "64", "--threads", "1"]
    result = CliRunner().invoke(verb, [*command, *sizes, "--report", str(page), "--json"])
    assert result.exit_code == 0, result.output
    (target,) = json.loads(result.stdout)["targets"]
    assert target["kl"]["mean"] > 0
    assert target["speed"]["decode_tokens_per_second"] > 0
    assert target["speed"]["peak_memory"] is None or target["speed"]["peak_memory"] > 1e6
    assert target["layers"] is None
    parse(page.read_text())
    table = CliRunner().invoke(verb, [*command, *sizes, "--no-speed"])
    assert "fox-int4" in table.stdout
    assert "KL, nats/token" in table.stdout


def test_the_verb_reports_invalid_arguments_as_wrong_usage():
    result = CliRunner().invoke(verb, ["int4"])
    assert result.exit_code == 2
    assert "give the float model with --checkpoint" in result.stderr
    assert CliRunner().invoke(verb, []).exit_code == 2
