"""The parity report as one HTML file that needs nothing else: no script, no font, no picture from anywhere."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from edgelm.files import atomic_file
from edgelm.pages.charts import Flag, Series, Span, line_chart
from edgelm.pages.numbers import number, percent
from edgelm.pages.page import REPORT, Column, device_facts, document, facts_table, files_table, table
from edgelm.parity.result import Check, Diagnosis, FloatLoss, ParityReport

_FLOOR = 1e-9  # nats: KL below it is drawn at it
_WORDS = {True: ("✓ pass", "pass"), False: ("✗ FAIL", "fail"), None: ("not judged", "none")}


def write_report(report: ParityReport, path: Path) -> None:
    """Write the report to `path`, whole or not at all; an earlier report there is replaced.

    Raises:
        EdgeLMError: something else is there, or there is no such folder.
    """
    with atomic_file(path, REPORT, overwrite=True) as partial:
        partial.write_text(render(report), encoding="utf-8")


def render(report: ParityReport) -> str:
    """The report as an HTML document."""
    sections = [
        _head(report),
        _cards(report),
        _checks(report.checks),
        _loss(report.float_loss),
        _charts(report),
        _prompts(report),
        _facts(report),
    ]
    return document(f"Parity of {Path(report.bundle).name}", sections)


def _head(report: ParityReport) -> str:
    word, style = ("✓ PASSED", "pass") if report.passed else ("✗ FAILED", "fail")
    notes = "".join(f'<p class="soft">{escape(note)}</p>' for note in report.notes)
    return (
        f"<h1>Parity of {escape(Path(report.bundle).name)}</h1>"
        f'<p class="answer {style}"><span class="badge">{word}</span> {escape(report.sentence)}</p>{_causes(report)}'
        f"<p>{escape(str(report.model.get('name', '')))} · recipe <code>{escape(report.recipe)}</code> · "
        f"{escape(str(report.device.get('cpu', '')))}</p>"
        f'<p class="soft">The bundle <code>{escape(report.bundle)}</code> was run on this device, and compared with '
        f"what the PyTorch reference computed ({escape(report.reference)}), at {report.positions:,} positions of "
        f"{len(report.prompts):,} prompts. Limits: those for <code>{escape(report.kind)}</code>.</p>{notes}"
    )


def _causes(report: ParityReport) -> str:
    """What failed, in words; "" where nothing did."""
    if not report.failures:
        return ""
    cause = f"<b>First divergence:</b> {escape(report.cause)}" if report.cause else "<b>What failed</b>"
    items = "".join(f"<li>{escape(_failure(check))}</li>" for check in report.failures)
    return f'<div class="cause">{cause}<ul>{items}</ul></div>'


def _failure(check: Check) -> str:
    if check.value is None or check.limit is None:
        return f"{check.title}: {_readable(check.detail)}"
    bound = "at most" if check.better == "lower" else "at least"
    return f"{check.title}: {_measured(check.value)}, allowed {bound} {number(check.limit)}"


def _cards(report: ParityReport) -> str:
    ratio = report.perplexity / report.perplexity_quantized if report.perplexity_quantized else float("nan")
    cards = [
        (f"{number(report.kl_mean, 3)} nats", "KL to the quantised reference, mean; lower is better"),
        (f"{number(report.kl_p99, 3)} nats", "99th percentile of it"),
        (f"{number(report.kl_max, 3)} nats", "largest of it"),
        (f"{number(report.float_kl_mean, 3)} nats", "KL to the float reference, mean: mostly the recipe's loss"),
        (percent(report.top1), "of positions: same most likely token as the quantised reference"),
        (percent(report.top1_clear), "of positions where its choice is clear"),
        (f"{report.greedy_prefix:,} of {report.greedy_total:,}", "greedy tokens as the quantised reference"),
        (number(ratio), "perplexity, device over quantised reference; 1 is equal"),
    ]
    items = "".join(
        f'<div class="card"><b>{escape(value)}</b><span>{escape(label)}</span></div>' for value, label in cards
    )
    return f'<div class="cards">{items}</div>'


def _checks(checks: Sequence[Check]) -> str:
    """What is judged as a whole, and every failure; the layers that pass are folded away."""
    shown = [check for check in checks if check.layer is None or check.passed is False]
    layers = [check for check in checks if check.layer is not None]
    folded = ""
    if layers:
        good = sum(check.passed is True for check in layers)
        summary = f"Layers: {good} of {len(layers)} checks pass"
        folded = f"<details><summary>{summary}</summary>{_check_table('Checks of layers', layers)}</details>"
    return f"<h2>Checks</h2>{_check_table('Checks', shown)}{folded}"


def _check_table(name: str, checks: Sequence[Check]) -> str:
    columns = (
        *(Column("Check", "long"), Column("Result", "mark")),
        *(Column("Measured", "num"), Column("Limit", "num"), Column("Detail", "long")),
    )
    rows = []
    for check in checks:
        bound = "" if check.limit is None else f"{'≤' if check.better == 'lower' else '≥'} {number(check.limit)}"
        value = "" if check.value is None else _measured(check.value)
        rows.append((check.title, _WORDS[check.passed][0], value, bound, _readable(check.detail)))
    return table(name, columns, rows, [_WORDS[check.passed][1] for check in checks])


def _readable(text: str) -> str:
    """A text for terminals with its powers of ten as the page writes them."""
    return re.sub(r"(?<![\w.])-?\d+(\.\d+)?e[+-]\d+", lambda found: number(float(found[0])), text)


def _measured(value: float) -> str:
    return "not a number" if math.isnan(value) else number(value)


def _loss(loss: FloatLoss) -> str:
    """Apart from the checks: what the recipe cost is no fault of the device."""
    warning = f'<div class="cause"><b>Warning:</b> {escape(loss.warning)}</div>' if loss.warning else ""
    head = "<h2>Lost against the float model</h2>"
    about = "What the recipe costs; no check counts it unless <code>--max-kl</code> is given."
    if not loss.known:
        return f'{head}<p class="soft">{escape(loss.text)}. {about}</p>'
    columns = (
        *(Column("Loss; lower is better", "long"), Column("Recipe by itself", "num")),
        *(Column("This device", "num"), Column("What the device adds", "num")),
    )
    rows = [
        (
            "Mean KL to the float reference, nats",
            *(number(loss.kl_reference), number(loss.kl), number(loss.kl - loss.kl_reference)),
        ),
        (
            "Perplexity above the float reference's",
            *(percent(loss.perplexity_reference), percent(loss.perplexity)),
            percent(loss.perplexity - loss.perplexity_reference),
        ),
    ]
    return f'{head}<p class="soft">{about}</p>{warning}{table("Loss", columns, rows)}'


def _charts(report: ParityReport) -> str:
    charts = [_kl_chart(report)]
    if report.diagnosis is not None:
        first = report.first_diverged_layer
        flag = None if first is None or first < 0 else Flag("first divergence", first)
        charts.append(_error_chart(report.diagnosis, flag))
        if report.diagnosis.experts_total:
            charts.append(_routing_chart(report.diagnosis, flag))
    return f"<h2>Where and how much</h2>{''.join(charts)}"


def _kl_chart(report: ParityReport) -> str:
    own: list[float] = []
    lost: list[float] = []
    spans = []
    for prompt in report.prompts:
        spans.append(Span(prompt.name, len(own), len(own) + len(prompt.kl)))
        own += prompt.kl
        lost += prompt.kl_float
    x = list(range(len(own)))
    return line_chart(
        "KL divergence at every position",
        [
            Series("to the float reference: mostly what the recipe lost", 2, x, lost, marks=False),
            Series("to the quantised reference: what this device adds", 1, x, own, marks=False),
        ],
        x_label="position, prompt by prompt",
        y_label="KL divergence, nats; lower is better",
        log=True,
        spans=spans,
        floor=_FLOOR,
    )


def _error_chart(diagnosis: Diagnosis, flag: Flag | None) -> str:
    layers = diagnosis.layers
    x = [layer.layer for layer in layers]
    return line_chart(
        "Error of the residual stream after each layer, median over positions",
        [
            Series("against the float reference: mostly the recipe", 2, x, [layer.error_float for layer in layers]),
            Series("against the quantised reference: this device", 1, x, [layer.error for layer in layers]),
            Series("added by the layer itself, on this device", 3, x, [layer.added for layer in layers]),
        ],
        x_label="layer",
        y_label="relative error; lower is better",
        log=True,
        flag=flag,
    )


def _routing_chart(diagnosis: Diagnosis, flag: Flag | None) -> str:
    layers = diagnosis.layers
    x = [layer.layer for layer in layers]
    return line_chart(
        "Positions with exactly the reference's experts",
        [
            Series("the float reference's", 2, x, [layer.same_float for layer in layers]),
            Series("the quantised reference's, where its choice was clear", 1, x, [layer.clear for layer in layers]),
            Series("the quantised reference's, at near-ties", 3, x, [layer.near for layer in layers]),
        ],
        x_label="layer",
        y_label="share of positions; higher is better",
        share=True,
        flag=flag,
    )


def _prompts(report: ParityReport) -> str:
    columns = (
        *(Column("No.", "num"), Column("Prompt", "long"), Column("Tokens", "num"), Column("KL mean, nats", "num")),
        *(Column("Top token same", "num"), Column("Greedy tokens same", "num")),
    )
    rows, texts = [], []
    for index, prompt in enumerate(report.prompts, 1):
        mean = sum(prompt.kl) / len(prompt.kl) if prompt.kl else None
        same = sum(prompt.top1_same) / len(prompt.top1_same) if prompt.top1_same else None
        greedy = f"{prompt.greedy_prefix} of {len(prompt.greedy)}" if prompt.greedy else "-"
        rows.append((str(index), prompt.name, f"{prompt.length:,}", number(mean), percent(same), greedy))
        continuation = f'<span class="more">{escape(prompt.greedy_text)}</span>' if prompt.greedy else ""
        texts.append(
            f'<h3>{index} {escape(prompt.name)}</h3><div class="mono text" dir="auto">'
            f"{escape(prompt.text)}{continuation}</div>"
        )
    return (
        f"<h2>Prompts</h2>{table('Prompts', columns, rows)}<details><summary>Texts of the prompts; the underlined end "
        f"is what this device chose for it, greedily</summary>{''.join(texts)}</details>"
    )


def _facts(report: ParityReport) -> str:
    run: dict[str, object] = {"runtime": report.runtime, "threads": report.threads}
    if report.speed is not None:
        run["loading, seconds"] = number(report.speed.load_s, 3)
        run["prefill, tokens a second (this check)"] = number(report.speed.prefill_tokens_per_s)
        run["decode, tokens a second (this check)"] = number(report.speed.decode_tokens_per_s)
    if report.diagnosis is not None and report.diagnosis.experts_total:
        seen, total = report.diagnosis.experts_seen, report.diagnosis.experts_total
        run["experts that the prompts exercise"] = f"{seen:,} of {total:,}"
    tools = {"recipe": report.recipe, "exported from": report.source, **report.tools}
    return (
        f"<h2>Run and device</h2>{facts_table('Run and device', {**run, **device_facts(report.device)})}"
        f"<h2>Model and bundle</h2>{facts_table('Model and bundle', {**report.model, **tools})}"
        f"<h2>Files</h2>{files_table('Files', report.files)}"
    )
