"""Does the verb print, and does the page show, what was measured; and do the plots show what they are given?"""

from __future__ import annotations

import itertools
import json
import re
import shutil

import pytest
from click.testing import CliRunner
from parity.wellformed import parse

from edgelm.cli.eval import eval as verb
from edgelm.cli.eval import summary
from edgelm.errors import EdgeLMError
from edgelm.evaluation import EvalOptions, evaluate
from edgelm.evaluation.report import render
from edgelm.pages.plots import Point, heat_map, scatter_chart

from .conftest import FLAVOUR


@pytest.fixture(scope="module")
def report(checkpoint, exported, quantized, text):
    targets = [exported("olmoe", "int4"), quantized("olmoe", "int8"), "int8", "none"]
    kv = ("int8",) if FLAVOUR == "native" else ()
    options = EvalOptions(text=text, tokens=256, length=64, layers=True, speed=False, kv=kv)
    return evaluate(targets, checkpoint("olmoe"), options)


def test_the_page_is_whole_and_has_every_target(report):
    html = render(report)
    page = parse(html)
    assert not page.fetched
    assert "script" not in page.tags
    for target in report.targets:
        assert html.count(target.name) >= 2
        assert f"{target.kl.mean:.3g}" in html
    assert report.text.sha256 in html
    for files in (report.reference.files, *(target.files for target in report.targets)):
        assert all(info["sha256"] in html for info in files.values())
    assert page.tags.count("svg") == 3 + 3  # frontier, layers, routing; a heat map for each of weights
    assert 'class="frontier"' in html
    experts = sum(len(row) for row in report.targets[-1].experts.error)
    assert len(re.findall(r"layer \d+, expert \d+: ", html)) == 3 * experts


def test_names_are_escaped(checkpoint, text, tmp_path):
    folder = tmp_path / "a <b> & c"
    shutil.copytree(checkpoint("fox"), folder)
    report = evaluate([folder], checkpoint("fox"), EvalOptions(text=text, tokens=64, length=64))
    html = render(report)
    parse(html)
    assert "a &lt;b&gt; &amp; c" in html
    assert "<b>" not in html


def test_the_summary_names_every_target_and_the_worst_experts(report):
    shown = summary(report)
    for target in report.targets:
        assert target.name in shown
    worst = report.targets[-2].experts.worst[0]
    assert f"{worst.layer}.{worst.expert} {worst.error:.3g}" in shown
    assert "float model" in shown
    assert ("over the float32 cache" in shown) == (FLAVOUR == "native")


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


def test_the_verb_refuses_as_the_library_does():
    result = CliRunner().invoke(verb, ["int4"])
    assert isinstance(result.exception, EdgeLMError)
    assert CliRunner().invoke(verb, []).exit_code == 2


def positions(svg):
    places = re.findall(r'<text class="name" text-anchor="(\w+)" x="([\d.]+)" y="([\d.]+)">([^<]*)', svg)
    return [(anchor, float(x), float(y), name) for anchor, x, y, name in places]


def test_names_of_points_in_one_place_do_not_cover_each_other():
    points = [Point(f"candidate {i}", 4.5 + 0.001 * i, 1e-2, "") for i in range(8)]
    points.append(Point("far to the right", 9.0, 1e-3, ""))
    svg = scatter_chart("t", points, [0, 8], x_label="x", y_label="y")
    parse(svg)
    found = positions(svg)
    assert [name for *_, name in found] == [point.name for point in points]
    heights = sorted(y for _, _, y, name in found if name.startswith("candidate"))
    assert min(b - a for a, b in itertools.pairwise(heights)) >= 13
    assert found[-1][0] == "end"
    assert svg.count("<circle") == 9


def test_a_plot_with_a_loss_of_nothing_or_one_point_is_drawn():
    svg = scatter_chart("t", [Point("exact", 16, 0.0, ""), Point("int4", 4, 1e-2, "")], [1, 0], x_label="", y_label="")
    parse(svg)
    assert svg.count("<circle") == 2
    parse(scatter_chart("t", [Point("one", 4.0, 0.01, "")], [0], x_label="", y_label=""))
    assert scatter_chart("t", [Point("nothing", 4.0, float("nan"), "")], [], x_label="", y_label="") == ""


def test_a_heat_map_is_darkest_at_the_largest():
    svg = heat_map("t", [[0.0, 1.0], [4.0, None]], [["a", "b"], ["c", "d"]], "layer")
    parse(svg)
    shades = re.findall(r'fill-opacity="([\d.]+)"[^>]*><title>(\w)', svg)
    assert shades == [("0.000", "a"), ("0.500", "b"), ("1.000", "c")]
    assert "<title>d</title>" in svg
    assert heat_map("t", [], [], "layer") == ""
