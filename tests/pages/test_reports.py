"""Do pages begin with one sentence, mark failures without colour, and escape names?"""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import pytest
from parity.wellformed import parse

from edgelm.evaluation.report import sentence
from edgelm.output_paths import check_output
from edgelm.pages import page
from edgelm.pages.page import REPORT
from edgelm.parity.result import Check, FloatLoss

from . import samples

NOT = "This device does NOT compute the same model as the reference:"
UNKNOWN_LOSS = FloatLoss(False, *[math.nan] * 4, None)
STYLE = Path(page.__file__).parent / "templates/style.css"


def failing(*checks, **fields):
    report = samples.parity(layers=2)
    return dataclasses.replace(report, passed=False, checks=[report.checks[1], *checks], **fields)


@pytest.mark.parametrize(
    ("report", "words"),
    [
        (
            samples.parity(layers=2),
            "This device computes the same model as the reference: mean KL 0.004 nats, limit 0.006.",
        ),
        (
            failing(Check("logits.kl_mean", "KL", False, ""), cause="layer 3, expert 5: only positions that chose it"),
            f"{NOT} it first differs in layer 3, expert 5.",
        ),
        (
            failing(Check("embedding", "E", False, ""), cause="the embedding, most rows"),
            f"{NOT} it first differs in the embedding, most rows.",
        ),
        (
            failing(Check("integrity", "Files", False, "")),
            "The bundle's files are damaged, though this device still computes the same model as the reference.",
        ),
        (
            failing(Check("tokenizer.encode", "T", False, ""), Check("integrity", "F", False, "")),
            "The bundle's tokenizer is not the one that was exported.",
        ),
        (
            failing(
                Check("integrity", "F", False, ""),
                Check("layer[0]", "L", False, ""),
                cause="layer 0, attention or feed-forward",
            ),
            f"{NOT} it first differs in layer 0, attention or feed-forward.",
        ),
        (
            failing(Check("float_kl", "KL", False, "")),
            "This device computes the same model as the reference, but quantisation lost more than --max-kl allows.",
        ),
        (
            failing(Check("float_kl", "KL", False, ""), float_loss=UNKNOWN_LOSS),
            "This device computes the same model as the reference, but the loss of quantisation is unknown, so "
            "--max-kl cannot be checked.",
        ),
        (
            failing(Check("float_kl", "KL", False, ""), Check("greedy.tokens", "G", False, "")),
            f"{NOT} 2 checks failed.",
        ),
        (failing(Check("pack", "P", False, "")), "The bundle's parity pack is not what this checkpoint gives."),
    ],
)
def test_parity_is_answered_in_one_sentence(report, words):
    assert report.sentence == words


def test_the_answer_comes_first_and_failures_are_listed_with_their_limits():
    html = samples.render(samples.parity(failed={"logits.kl_mean"}, first=1))
    assert re.search(r'</h1>\s<p class="answer fail"><span class="badge">✗ FAILED</span> This device does NOT', html)
    assert "<li>KL(quantised reference || device), mean, nats: 0.5, allowed at most 0.006</li>" in html
    assert re.search(r'<tr class="fail"><td class="long">KL[^<]*</td><td class="mark">✗ FAIL</td>', html)
    assert re.search(r'<tr class="none"><td class="long">Greedy[^<]*</td><td class="mark">not judged</td>', html)
    passed = samples.render(samples.parity())
    assert re.search(r'</h1>\s<p class="answer pass"><span class="badge">✓ PASSED</span>', passed)
    assert "FAIL" not in passed.split("<body>")[1]


def test_a_check_without_a_numeric_value_says_so():
    report = failing(Check("logits.kl_mean", "KL", False, "", math.nan, 0.1))
    assert "KL: not a number, allowed at most 0.1" in samples.render(report)


def test_details_have_no_numbers_in_exponent_notation():
    report = failing(Check("layer[1]", "Layer 1", False, "added error 4.44e-05 (median)"))
    assert "added error 4.44 \N{MULTIPLICATION SIGN} 10⁻⁵ (median)" in samples.render(report)


def test_the_evaluation_is_answered_first():
    html = samples.render(samples.evaluation(samples.six()))
    assert '</h1>\n<p class="answer">Closest to the float model is &#34;int8&#34;: the same most likely token' in html
    said = sentence(samples.evaluation(samples.six()))
    assert 'Smallest, with 5.04 MB, is "int4": the same most likely token for 92 % of tokens, KL 0.016 nats' in said
    assert said.endswith('Equal to the float model: "none".')


def test_one_candidate_or_no_float_model_gives_an_answer_too():
    one = samples.target("int4", 0.016, 5.0)
    assert sentence(samples.evaluation([one])).startswith('"int4" beside the float model: the same most likely token')
    both = samples.evaluation([one, samples.target("int8", 0.02, 8.0)])
    assert sentence(both).startswith('Smallest and closest to the float model is "int4"')
    assert sentence(samples.evaluation([samples.target("none", 0.0, 16.0)])) == 'Equal to the float model: "none".'
    blind = dataclasses.replace(samples.evaluation([dataclasses.replace(one, kl=None)]), reference=None)
    assert sentence(blind) == '"int4" has a perplexity of 25.75.'
    parse(samples.render(blind))


def test_numbers_are_written_for_people():
    html = samples.render(samples.evaluation(samples.six()))
    for text in ("61,200", "78.2 MB", "16,384 tokens", "25.3 GB", "2026-11-29 01:04:40 UTC"):
        assert text in html
    assert '<span title="2,723,840 bytes">2.72 MB</span>' in html
    body = html.split("<body>")[1]
    assert not re.search(r"\d[eE][-+]?\d\d", re.sub("[0-9a-f]{64}", "", body))


def test_heat_maps_of_a_report_share_the_scale_of_the_legend():
    html = samples.render(samples.evaluation(samples.six()))
    assert html.count("All maps below have this one scale") == 1
    maps = re.findall(r"<figcaption>([^:<]*): error of each expert(.*?)</figure>", html, re.S)
    assert [name for name, _ in maps] == ["int4", "bundle", "bundle with int8 cache", "int8", "fp8"]
    darkest = {name: max(map(float, re.findall(r'fill-opacity="([\d.]+)"', svg))) for name, svg in maps}
    assert darkest["int8"] < darkest["fp8"] < darkest["int4"]


def test_several_charts_of_layers_share_an_axis():
    many = [samples.target(f"c{i}", 0.01, 5.0, layers=4, scale=10.0**-i) for i in range(1, 9)]
    html = samples.render(samples.evaluation(many, experts=0))
    charts = re.findall(r"<figcaption>Error of the residual stream.*?</figure>", html, re.S)
    assert len(charts) == 2
    scales = [re.findall(r'class="end" [^>]*>([^<]*)<', chart) for chart in charts]
    assert scales[0] == scales[1]
    assert sum(chart.count('<div class="legend">') for chart in charts) == 2
    for candidate in many:
        assert sum(f">{candidate.name}</span>" in chart for chart in charts) == 1


@pytest.mark.parametrize("make", ["parity", "evaluation"])
def test_names_are_escaped_in_pages(make):
    evil = samples.EVIL
    if make == "parity":
        report = samples.PAGES["evil"]()
    else:
        targets = [dataclasses.replace(t, name=f"{evil}{i}", notes=(evil,)) for i, t in enumerate(samples.six())]
        report = dataclasses.replace(samples.evaluation(targets), model=evil, notes=(evil,), device={evil: evil})
    html = samples.render(report)
    page = parse(html)
    assert "script" not in page.tags
    assert page.fetched == []
    assert "&lt;script&gt;" in html
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e\ud800-\udfff]", html)
    html.encode("utf-8")


def test_a_report_with_a_long_title_is_recognised(tmp_path):
    file = tmp_path / "report.html"
    file.write_text(samples.render(samples.parity(name="<" * 4000)), encoding="utf-8")
    check_output(file, REPORT, overwrite=True)


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_and_curves_have_enough_contrast(theme):
    blocks = re.findall(r":root \{([^}]*)\}", STYLE.read_text(encoding="utf-8"))
    colours = dict(re.findall(r"--([\w-]+): (#\w{6})", blocks[theme]))

    def contrast(first, second):
        low, high = sorted((luminance(colours[first]), luminance(colours[second])))
        return (high + 0.05) / (low + 0.05)

    for name in ("ink", "soft", "good", "bad"):
        for ground in ("page", "band"):
            assert contrast(name, ground) >= 4.5, (name, ground)
    for name in ("heat", *(f"series-{i}" for i in range(1, 7))):
        assert contrast(name, "page") >= 3, name
