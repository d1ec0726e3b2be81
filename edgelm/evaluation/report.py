"""The evaluation as one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from edgelm.evaluation.result import EvaluationReport, ExpertErrors, TargetResult, frontier
from edgelm.files import atomic_file
from edgelm.pages.charts import Series, line_chart
from edgelm.pages.page import REPORT, document, facts_table, files_table, number, percent
from edgelm.pages.plots import Point, heat_map, scatter_chart

_COLOURS = 4  # curves that a chart can tell apart


def write_report(report: EvaluationReport, path: Path) -> None:
    """Write the report to `path`, whole or not at all; an earlier report there is replaced.

    Raises:
        EdgeLMError: something else is there, or there is no such folder.
    """
    with atomic_file(path, REPORT, overwrite=True) as partial:
        partial.write_text(render(report), encoding="utf-8")


def render(report: EvaluationReport) -> str:
    """The report as an HTML document."""
    sections = [_head(report), _table(report), _frontier(report), _caches(report), _layers(report), _experts(report)]
    return document(f"Evaluation of {report.model}", [*filter(None, sections), _facts(report)])


def _head(report: EvaluationReport) -> str:
    text = report.text
    notes = "".join(f'<p class="soft">{escape(note)}</p>' for note in report.notes)
    return (
        "<h1>Evaluation</h1>"
        f"<p>{escape(report.model)} · {escape(str(report.device.get('cpu', '')))} · {escape(report.created)}</p>"
        f'<p class="soft">What each candidate keeps of the float model, on {text.tokens} tokens of '
        f"<code>{escape(text.name)}</code> in {text.windows} independent windows of {text.length}. KL is "
        "KL(float || candidate) in nats a token, over the whole vocabulary; ± is the standard error over windows.</p>"
        f"{notes}"
    )


def _table(report: EvaluationReport) -> str:
    names = (
        *("MB", "Bits / weight", "KL, nats", "median", "p99", "Top-1 same", "Perplexity"),
        *("Prefill / s", "Decode / s", "Peak MB"),
    )
    header = "<th>Candidate</th>" + "".join(f'<th class="num">{name}</th>' for name in names)
    rows = []
    if report.reference is not None:
        reference = report.reference
        cells = [
            *(number(reference.stored_bytes / 1e6), number(reference.bits_per_weight), *("",) * 4),
            *(number(reference.perplexity), "", "", ""),
        ]
        rows.append(_line("float model", "as stored, computed in float32", cells))
    rows += [_line(target.name, f"{target.kind}, {target.arithmetic}", _cells(target)) for target in report.targets]
    notes = dict.fromkeys(f"{target.target}: {note}" for target in report.targets for note in target.notes)
    said = "".join(f'<p class="soft">{escape(note)}</p>' for note in notes)
    return f'<h2>Candidates</h2><div class="wide"><table><tr>{header}</tr>{"".join(rows)}</table></div>{said}'


def _cells(target: TargetResult) -> list[str]:
    kl, speed = target.kl, target.speed
    divergence = ["", "", "", ""]
    if kl is not None:
        divergence = [f"{kl.mean:.3g} ± {kl.standard_error:.1g}", f"{kl.median:.2g}", f"{kl.p99:.2g}", percent(kl.top1)]
    fast = ["", "", ""]
    if speed is not None:
        peak = None if speed.peak_memory is None else speed.peak_memory / 1e6
        fast = [number(speed.prefill_tokens_per_second), number(speed.decode_tokens_per_second), number(peak)]
    size = [number(target.stored_bytes / 1e6), number(target.bits_per_weight)]
    return [*size, *divergence, number(target.perplexity), *fast]


def _line(name: str, how: str, cells: Sequence[str]) -> str:
    numbers = "".join(f'<td class="num">{escape(cell)}</td>' for cell in cells)
    return f'<tr><td>{escape(name)}<br><span class="soft">{escape(how)}</span></td>{numbers}</tr>'


def _frontier(report: EvaluationReport) -> str:
    """KL against size: bits per weight, which a float model always comes with."""
    points = [
        Point(
            target.name,
            target.bits_per_weight,
            target.kl.mean,
            f"{target.name}: {target.stored_bytes / 1e6:.4g} MB, {target.bits_per_weight:.3g} bits a weight, "
            f"KL {target.kl.mean:.3g}",
        )
        for target in report.targets
        if target.kl is not None and target.bits_per_weight is not None
    ]
    if not points:
        return ""
    best = frontier([(point.x, point.y) for point in points])
    chart = scatter_chart(
        "KL against size; the dashed line joins what no other candidate beats in both",
        points,
        best,
        x_label="bits per weight, as stored",
        y_label="KL, nats a token",
        floor=1e-9,
    )
    return f"<h2>Size and loss</h2>{chart}"


def _caches(report: EvaluationReport) -> str:
    bases = {target.target: target.kl.mean for target in report.targets if target.kl and target.kv == "float32"}
    rows = []
    for target in report.targets:
        if target.kv_loss is not None:
            base, lost = bases[target.target], target.kv_loss
            share = percent(lost.mean / base) if base > 0 else "-"
            cells = f'<td class="num">{lost.mean:+.2g} ± {lost.standard_error:.1g}</td><td class="num">{share}</td>'
            rows.append(f"<tr><td>{escape(target.name)}</td>{cells}</tr>")
    if not rows:
        return ""
    return (
        '<h2>What the cache costs</h2><div class="wide"><table><tr><th>Candidate</th>'
        '<th class="num">KL more than with a float32 cache, nats</th><th class="num">of that KL</th></tr>'
        f"{''.join(rows)}</table></div>"
    )


def _layers(report: EvaluationReport) -> str:
    # The layers are computed once for all caches of a bundle.
    measured = [target for target in report.targets if any(layer.error > 0 for layer in target.layers or ())]
    shown = {target.target: target for target in reversed(measured)}
    targets = list(reversed(shown.values()))
    charts = []
    for start in range(0, len(targets), _COLOURS):
        part = targets[start : start + _COLOURS]
        errors, same = [], []
        for colour, target in enumerate(part, 1):
            layers = target.layers or ()
            errors.append(Series(target.name, colour, [e.layer for e in layers], [e.error for e in layers]))
            routed = [(e.layer, e.same_experts) for e in layers if e.same_experts is not None]
            same.append(Series(target.name, colour, [layer for layer, _ in routed], [share for _, share in routed]))
        charts.append(
            line_chart(
                "Relative error of the residual stream after each layer, median over tokens (-1: the embedding)",
                errors,
                x_label="layer",
                y_label="relative error",
                log=True,
            )
        )
        charts.append(
            line_chart(
                "Share of tokens for which the router chose the float model's experts",
                same,
                x_label="layer",
                y_label="share of tokens",
                y_range=(0.0, 1.0),
            )
        )
    return f"<h2>Layers</h2>{''.join(charts)}" if charts else ""


def _experts(report: EvaluationReport) -> str:
    measured = [(target, target.experts) for target in report.targets if target.experts is not None]
    if not measured or report.reference is None or report.reference.expert_tokens is None:
        return ""
    tokens = report.reference.expert_tokens
    parts = [
        '<h2>Experts</h2><p class="soft">Squared error of each expert\'s output, relative, on the tokens that the '
        "float model gives it: what quantising its own weights costs. An empty square is an expert that got none.</p>"
    ]
    for target, errors in measured:
        tips = [
            [
                f"layer {layer}, expert {expert}: {number(value)}, {tokens[layer][expert]} tokens"
                for expert, value in enumerate(row)
            ]
            for layer, row in enumerate(errors.error)
        ]
        title = f"{target.name}: layers down, experts across; the darkest is {number(_largest(errors))}"
        parts.append(heat_map(title, errors.error, tips, "layer"))
        parts.append(_worst(errors))
    return "".join(parts)


def _largest(errors: ExpertErrors) -> float | None:
    return errors.worst[0].error if errors.worst else 0.0


def _worst(errors: ExpertErrors) -> str:
    if not errors.worst:
        return ""
    rows = "".join(
        f'<tr><td>layer {worst.layer}, expert {worst.expert}</td><td class="num">{number(worst.error)}</td>'
        f'<td class="num">{worst.tokens}</td></tr>'
        for worst in errors.worst
    )
    return (
        "<details><summary>The worst experts</summary>"
        '<div class="wide"><table><tr><th>Expert</th><th class="num">Squared error</th><th class="num">Tokens</th></tr>'
        f"{rows}</table></div></details>"
    )


def _facts(report: EvaluationReport) -> str:
    text, reference = report.text, report.reference
    run: dict[str, object] = {
        "text": text.name,
        "SHA-256 of the text": text.sha256,
        "tokens": f"{text.tokens} in {text.windows} windows of {text.length}",
        "seconds": report.seconds,
        **report.versions,
    }
    parts = [
        f"<h2>Text and versions</h2>{facts_table(run)}<h2>Device</h2>{facts_table(report.device)}",
        "<h2>Files</h2>",
    ]
    if reference is not None:
        parts.append(f"<p>float model, {escape(reference.checkpoint)}</p>{files_table(reference.files)}")
    seen: set[str] = set()
    for target in report.targets:
        if target.target not in seen:
            parts.append(
                f"<p>{escape(target.target)}, recipe {escape(str(target.recipe))}</p>{files_table(target.files)}"
            )
        seen.add(target.target)
    return "".join(parts)
