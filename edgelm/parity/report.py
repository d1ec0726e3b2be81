"""The parity report as one HTML file that needs nothing else: no script, no font, no picture from anywhere."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from edgelm.files import atomic_file
from edgelm.parity.charts import Series, Span, line_chart
from edgelm.parity.result import Check, ParityReport

STYLE = """
:root { --page: #ffffff; --ink: #1c2126; --soft: #5b6670; --line: #d9dee3; --band: #f4f6f8; --good: #17734a;
  --bad: #b3261e; --skip: #6b7680; --series-1: #1f6feb; --series-2: #d9730d; --series-3: #8a5cd1; --series-4: #2a9d8f; }
@media (prefers-color-scheme: dark) { :root { --page: #14181c; --ink: #e4e8ec; --soft: #9aa6b2; --line: #333c45;
  --band: #1c2228; --good: #4cc38a; --bad: #ff8078; --skip: #8b97a3; --series-1: #6cb0ff; --series-2: #ffab5e;
  --series-3: #b89bf2; --series-4: #5fd0c1; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 980px; padding: 28px 20px 60px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 25px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 36px 0 8px; } p { margin: 6px 0; }
.soft { color: var(--soft); } code, .mono { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: 13px; }
.verdict { display: inline-block; padding: 3px 14px; border-radius: 6px; color: var(--page); font-weight: 700; }
.verdict.pass { background: var(--good); } .verdict.fail { background: var(--bad); }
.cause { border-left: 4px solid var(--bad); padding: 6px 12px; background: var(--band); margin: 14px 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(205px, 1fr)); gap: 10px; margin: 18px 0; }
.card { border: 1px solid var(--line); border-radius: 8px; padding: 9px 12px; }
.card b { display: block; font-size: 20px; } .card span { color: var(--soft); font-size: 13px; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; min-width: 640px; font-size: 14px; }
th, td { text-align: left; padding: 5px 10px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; } td.num { text-align: right; white-space: nowrap; }
th.num { text-align: right; } .pass { color: var(--good); } .fail { color: var(--bad); font-weight: 700; }
.verdict.pass, .verdict.fail { color: var(--page); } .skip { color: var(--skip); }
figure { margin: 18px 0; } figcaption { font-weight: 600; } svg { width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 12px; } svg .label { text-anchor: middle; }
.grid { stroke: var(--line); stroke-width: 1; } .span { fill: var(--band); }
.limit { stroke: var(--bad); stroke-width: 1.5; stroke-dasharray: 2 4; }
path { fill: none; stroke-width: 2; } .s1 { stroke: var(--series-1); } .s2 { stroke: var(--series-2); }
.s3 { stroke: var(--series-3); } .s4 { stroke: var(--series-4); } .c1 { fill: var(--series-1); }
.c2 { fill: var(--series-2); } .c3 { fill: var(--series-3); } .c4 { fill: var(--series-4); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 13px; color: var(--soft); }
.legend i { display: inline-block; width: 18px; height: 0; border-top: 3px solid; margin: 0 6px 4px 0; }
.legend .dashed { border-top-style: dashed; } .b1 { color: var(--series-1); } .b2 { color: var(--series-2); }
.b3 { color: var(--series-3); } .b4 { color: var(--series-4); }
.legend .blimit { color: var(--bad); border-top-style: dotted; }
details { margin: 12px 0; } summary { cursor: pointer; color: var(--soft); }
.text { white-space: pre-wrap; word-break: break-word; } .more { color: var(--soft); }
"""


def write_report(report: ParityReport, path: Path) -> None:
    """Write the report to `path`, whole or not at all."""
    with atomic_file(path) as partial:
        partial.write_text(render(report), encoding="utf-8")


def render(report: ParityReport) -> str:
    """The report as an HTML document."""
    sections = [
        _head(report),
        _cards(report),
        _checks(report.checks),
        _charts(report),
        _prompts(report),
        _facts(report),
    ]
    title = escape(f"Parity of {Path(report.bundle).name}")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head>\n<body>\n" + "\n".join(sections) + "\n</body></html>\n"
    )


def _number(value: float | None, unit: str = "") -> str:
    if value is None or not math.isfinite(value):
        return "-"
    text = f"{value:.4g}" if abs(value) < 1e5 else f"{value:.3e}"
    return f"{text}{unit}"


def _percent(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{100 * value:.4g} %"


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
        ("KL to the quantised reference, mean, nats", _number(report.kl_mean)),
        ("KL to the quantised reference, p99 / max, nats", f"{_number(report.kl_p99)} / {_number(report.kl_max)}"),
        ("KL to the float reference, mean, nats", _number(report.float_kl_mean)),
        ("Top-1 as the quantised reference, all positions", _percent(report.top1)),
        ("Top-1 as the quantised reference, clear positions", _percent(report.top1_clear)),
        ("Greedy tokens as the quantised reference", f"{report.greedy_prefix} of {report.greedy_total}"),
        ("Perplexity, device / quantised reference", _number(ratio)),
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
        bound = "" if check.limit is None else f"{'≤' if check.better == 'lower' else '≥'} {_number(check.limit)}"
        rows.append(
            f'<tr><td class="{style}">{word}</td><td>{escape(check.title)}</td>'
            f'<td class="num">{"" if check.value is None else _number(check.value)}</td><td class="num">{bound}</td>'
            f"<td>{escape(check.detail)}</td></tr>"
        )
    return (
        '<div class="wide"><table><tr><th>Verdict</th><th>Check</th><th class="num">Measured</th>'
        f'<th class="num">Limit</th><th>Detail</th></tr>{"".join(rows)}</table></div>'
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
            f'<td class="num">{_number(mean)}</td>'
            f'<td class="num">{_percent(same)}</td><td class="num">{greedy}</td>'
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
        run["loading, seconds"] = _number(report.speed.load_s)
        run["prefill, tokens a second (this check)"] = _number(report.speed.prefill_tokens_per_s)
        run["decode, tokens a second (this check)"] = _number(report.speed.decode_tokens_per_s)
    if report.diagnosis is not None and report.diagnosis.experts_total:
        seen, total = report.diagnosis.experts_seen, report.diagnosis.experts_total
        run["experts that the prompts exercise"] = f"{seen} of {total}"
    files = "".join(
        f'<tr><td class="mono">{escape(name)}</td><td class="num">{info.get("size")}</td>'
        f'<td class="mono">{escape(str(info.get("sha256")))}</td></tr>'
        for name, info in report.files.items()
    )
    return (
        f"<h2>Device and run</h2>{_table(run)}{_table(report.device)}"
        f"<h2>Model and bundle</h2>{_table(report.model)}"
        f"{_table({'recipe': report.recipe, 'exported from': report.source, **report.tools})}"
        '<h2>Files</h2><div class="wide"><table><tr><th>File</th><th class="num">Bytes</th><th>SHA-256</th></tr>'
        f"{files}</table></div>"
    )


def _table(facts: Mapping[str, object]) -> str:
    rows = "".join(
        f"<tr><td>{escape(key.replace('_', ' '))}</td><td>{escape(_fact(value))}</td></tr>"
        for key, value in facts.items()
    )
    return f'<div class="wide"><table><tr><th>What</th><th>Value</th></tr>{rows}</table></div>'


def _fact(value: object) -> str:
    if value is None:
        return "-"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
