"""The parity report as one HTML file that needs nothing else: no script, no font, no picture from anywhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from edgelm.files import atomic_file
from edgelm.pages.charts import Series, Span, line_chart
from edgelm.pages.page import REPORT, document, facts_table, files_table, number, percent
from edgelm.parity.result import Check, FloatLoss, ParityReport


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
    word, style = ("PASSED", "pass") if report.passed else ("FAILED", "fail")
    model = report.model
    cause = f'<div class="cause"><b>First divergence:</b> {escape(report.cause)}</div>' if report.cause else ""
    notes = "".join(f'<p class="soft">{escape(note)}</p>' for note in report.notes)
    return (
        f'<h1>Parity report <span class="verdict {style}">{word}</span></h1>'
        f"<p>{escape(str(model.get('name', '')))} · recipe <code>{escape(report.recipe)}</code> · limits for "
        f"<code>{escape(report.kind)}</code> · {escape(str(report.device.get('cpu', '')))}</p>"
        f'<p class="soft">What this device computes with <code>{escape(report.bundle)}</code>, against what the '
        f"PyTorch reference computed ({escape(report.reference)}), at {report.positions} positions of "
        f"{len(report.prompts)} prompts.</p>{cause}{notes}"
    )


def _cards(report: ParityReport) -> str:
    diverged = "none"
    if report.first_diverged_layer is not None:
        diverged = "embedding" if report.first_diverged_layer < 0 else f"layer {report.first_diverged_layer}"
    ratio = report.perplexity / report.perplexity_quantized if report.perplexity_quantized else float("nan")
    cards = [
        ("KL to the quantised reference, mean, nats", number(report.kl_mean)),
        ("KL to the quantised reference, p99 / max, nats", f"{number(report.kl_p99)} / {number(report.kl_max)}"),
        ("KL to the float reference, mean, nats", number(report.float_kl_mean)),
        ("Top-1 as the quantised reference, all positions", percent(report.top1)),
        ("Top-1 as the quantised reference, clear positions", percent(report.top1_clear)),
        ("Greedy tokens as the quantised reference", f"{report.greedy_prefix} of {report.greedy_total}"),
        ("Perplexity, device / quantised reference", number(ratio)),
        ("First diverged layer", diverged),
    ]
    items = "".join(
        f'<div class="card"><b>{escape(value)}</b><span>{escape(label)}</span></div>' for label, value in cards
    )
    return f'<div class="cards">{items}</div>'


def _checks(checks: Sequence[Check]) -> str:
    """What is judged as a whole, and every failure; the layers that pass are folded away."""
    shown = [check for check in checks if check.layer is None or check.passed is False]
    layers = [check for check in checks if check.layer is not None]
    folded = ""
    if layers:
        good = sum(check.passed is True for check in layers)
        folded = (
            f"<details><summary>Layers: {good} of {len(layers)} checks pass</summary>{_check_table(layers)}</details>"
        )
    return f"<h2>Checks</h2>{_check_table(shown)}{folded}"


def _check_table(checks: Iterable[Check]) -> str:
    rows = []
    for check in checks:
        word, style = {True: ("pass", "pass"), False: ("FAIL", "fail"), None: ("not judged", "skip")}[check.passed]
        bound = "" if check.limit is None else f"{'≤' if check.better == 'lower' else '≥'} {number(check.limit)}"
        rows.append(
            f'<tr><td class="{style}">{word}</td><td>{escape(check.title)}</td>'
            f'<td class="num">{"" if check.value is None else number(check.value)}</td><td class="num">{bound}</td>'
            f"<td>{escape(check.detail)}</td></tr>"
        )
    return (
        '<div class="wide"><table><tr><th>Verdict</th><th>Check</th><th class="num">Measured</th>'
        f'<th class="num">Limit</th><th>Detail</th></tr>{"".join(rows)}</table></div>'
    )


def _loss(loss: FloatLoss) -> str:
    """Apart from the checks: what the recipe cost is no fault of the device."""
    warning = f'<div class="cause"><b>Warning:</b> {escape(loss.warning)}</div>' if loss.warning else ""
    head = "<h2>Lost against the float model</h2>"
    about = "Information: no check counts it unless <code>--max-kl</code> is given."
    if not loss.known:
        return f'{head}<p class="soft">{escape(loss.text)}. {about}</p>'
    rows = [
        ("KL(float reference || …), mean, nats", number(loss.kl_reference), number(loss.kl)),
        ("Perplexity, … / float reference - 1", percent(loss.perplexity_reference), percent(loss.perplexity)),
    ]
    body = "".join(
        f'<tr><td>{escape(title)}</td><td class="num">{recipe}</td><td class="num">{device}</td></tr>'
        for title, recipe, device in rows
    )
    return (
        f'{head}<p class="soft">{about}</p>{warning}<div class="wide"><table><tr><th></th><th class="num">'
        f'quantised reference: the recipe by itself</th><th class="num">device</th></tr>{body}</table></div>'
    )


def _charts(report: ParityReport) -> str:
    charts = [_kl_chart(report)]
    if report.diagnosis is not None:
        layers = report.diagnosis.layers
        x = [layer.layer for layer in layers]
        charts.append(
            line_chart(
                "Relative error of the residual stream after each layer (median over positions)",
                [
                    Series("against the quantised reference", 1, x, [layer.error for layer in layers]),
                    Series("added by the layer itself", 3, x, [layer.added for layer in layers], dashed=True),
                    Series("against the float reference", 2, x, [layer.error_float for layer in layers]),
                ],
                x_label="layer",
                y_label="relative error",
                log=True,
            )
        )
        if report.diagnosis.experts_total:
            charts.append(
                line_chart(
                    "Share of positions with exactly the reference's experts",
                    [
                        Series("quantised reference, router margin clear", 1, x, [layer.clear for layer in layers]),
                        Series("quantised reference, near-tie", 3, x, [layer.near for layer in layers], dashed=True),
                        Series("float reference", 2, x, [layer.same_float for layer in layers]),
                    ],
                    x_label="layer",
                    y_label="share of positions",
                    y_range=(0.0, 1.0),
                )
            )
    return "<h2>Where and how much</h2>" + "".join(charts)


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
        "KL divergence at every position, in nats (drawn from 1e-9 up)",
        [
            Series("float reference || device", 2, x, [max(value, 1e-9) for value in lost], dots=False),
            Series("quantised reference || device", 1, x, [max(value, 1e-9) for value in own], dots=False),
        ],
        x_label="position, prompt by prompt",
        y_label="KL, nats",
        log=True,
        spans=spans,
        floor=1e-10,
    )


def _prompts(report: ParityReport) -> str:
    rows = []
    for prompt in report.prompts:
        continuation = f'<span class="more"> {escape(prompt.greedy_text)}</span>' if prompt.greedy else ""
        greedy = f"{prompt.greedy_prefix} of {len(prompt.greedy)}" if prompt.greedy else "-"
        mean = sum(prompt.kl) / len(prompt.kl) if prompt.kl else float("nan")
        same = sum(prompt.top1_same) / len(prompt.top1_same) if prompt.top1_same else float("nan")
        rows.append(
            f'<tr><td>{escape(prompt.name)}</td><td class="num">{prompt.length}</td>'
            f'<td class="num">{number(mean)}</td>'
            f'<td class="num">{percent(same)}</td><td class="num">{greedy}</td>'
            f'<td class="mono text">{escape(prompt.text)}{continuation}</td></tr>'
        )
    return (
        '<h2>Prompts</h2><p class="soft">The grey end of a text is what this device chose for it, greedily.</p>'
        '<div class="wide"><table><tr><th>Prompt</th><th class="num">Tokens</th><th class="num">KL mean, nats</th>'
        '<th class="num">Top-1 same</th><th class="num">Greedy tokens same</th><th>Text</th></tr>'
        f"{''.join(rows)}</table></div>"
    )


def _facts(report: ParityReport) -> str:
    run: dict[str, object] = {"runtime": report.runtime, "threads": report.threads}
    if report.speed is not None:
        run["loading, seconds"] = number(report.speed.load_s)
        run["prefill, tokens a second (this check)"] = number(report.speed.prefill_tokens_per_s)
        run["decode, tokens a second (this check)"] = number(report.speed.decode_tokens_per_s)
    if report.diagnosis is not None and report.diagnosis.experts_total:
        seen, total = report.diagnosis.experts_seen, report.diagnosis.experts_total
        run["experts that the prompts exercise"] = f"{seen} of {total}"
    return (
        f"<h2>Device and run</h2>{facts_table(run)}{facts_table(report.device)}"
        f"<h2>Model and bundle</h2>{facts_table(report.model)}"
        f"{facts_table({'recipe': report.recipe, 'exported from': report.source, **report.tools})}"
        f"<h2>Files</h2>{files_table(report.files)}"
    )
