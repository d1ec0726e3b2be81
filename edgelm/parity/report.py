"""Render a parity report as one HTML page, with the template `parity.html.j2` of `edgelm.pages`."""

from __future__ import annotations

from pathlib import Path

from edgelm.pages.charts import Flag, Series, Span, line_chart
from edgelm.pages.frame import Figure
from edgelm.pages.numbers import number
from edgelm.pages.page import render as render_page
from edgelm.pages.page import write_page
from edgelm.parity.result import Diagnosis, ParityReport, counted, summary_lines

_FLOOR = 1e-9  # nats; smaller KL is drawn at this value


def write_report(report: ParityReport, path: Path) -> None:
    """Write the report to `path`; raises as `write_page`."""
    write_page(render(report), path)


def render(report: ParityReport) -> str:
    """Return the report as an HTML document."""
    run: dict[str, object] = {"runtime": report.runtime, "threads": report.threads}
    if report.speed is not None:
        run["loading, seconds"] = number(report.speed.load_s, 3)
        run["prefill, tokens per second (this check)"] = number(report.speed.prefill_tokens_per_s)
        run["decode, tokens per second (this check)"] = number(report.speed.decode_tokens_per_s)
    if report.diagnosis is not None and report.diagnosis.experts_total:
        seen, total = report.diagnosis.experts_seen, report.diagnosis.experts_total
        run["experts that the prompts exercise"] = f"{seen:,} of {total:,}"
    return render_page(
        "parity.html.j2",
        report=report,
        name=Path(report.bundle).name,
        checks=[check for check in report.checks if check.layer is None or check.passed is False],
        summary=summary_lines(report),
        counted=counted(report),
        layer_checks=[check for check in report.checks if check.layer is not None],
        charts=_charts(report),
        run={**run, **report.device},
        model={**report.model, "recipe": report.recipe, "exported from": report.source, **report.tools},
    )


def _charts(report: ParityReport) -> list[Figure | None]:
    charts = [_kl_chart(report)]
    if report.diagnosis is not None:
        first = report.first_diverged_layer
        flag = None if first is None or first < 0 else Flag("first difference", first)
        charts.append(_error_chart(report.diagnosis, flag))
        if report.diagnosis.experts_total:
            charts.append(_routing_chart(report.diagnosis, flag))
    return charts


def _kl_chart(report: ParityReport) -> Figure | None:
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


def _error_chart(diagnosis: Diagnosis, flag: Flag | None) -> Figure | None:
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


def _routing_chart(diagnosis: Diagnosis, flag: Flag | None) -> Figure | None:
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
