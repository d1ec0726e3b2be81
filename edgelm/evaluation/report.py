"""Render an evaluation as one HTML page, with the template `evaluation.html.j2` of `edgelm.pages`."""

from __future__ import annotations

from pathlib import Path

from edgelm.evaluation.result import Divergence, Estimate, EvaluationReport, ExpertErrors, TargetResult, frontier
from edgelm.pages.charts import STYLES, Series, line_chart
from edgelm.pages.frame import Figure
from edgelm.pages.heat import Scale, heat_map
from edgelm.pages.numbers import number, percent
from edgelm.pages.page import render as render_page
from edgelm.pages.page import write_page
from edgelm.pages.plots import Point, scatter_chart
from edgelm.sizes import format_size


def write_report(report: EvaluationReport, path: Path) -> None:
    """Write the report's HTML page to `path`; raises as `write_page`."""
    write_page(render(report), path)


def render(report: EvaluationReport) -> str:
    """Return the report as an HTML document."""
    text = report.text
    layer_charts, exact_layers = _layers(report)
    measured = [(target, target.experts) for target in report.targets if target.experts is not None]
    scale = Scale.of(value for _, errors in measured for row in errors.error for value in row)
    tokens = None if report.reference is None else report.reference.expert_tokens
    return render_page(
        "evaluation.html.j2",
        report=report,
        sentence=sentence(report),
        notes=list(dict.fromkeys(f"{target.target}: {note}" for target in report.targets for note in target.notes)),
        size_and_loss=_size_and_loss(report),
        caches=_caches(report),
        layer_charts=layer_charts,
        exact_layers=exact_layers,
        scale=scale,
        expert_maps=[
            (target, _expert_map(target.name, errors, tokens, scale)) for target, errors in measured if tokens
        ],
        run={
            "text": text.name,
            "SHA-256 of the text": text.sha256,
            "tokens": f"{text.tokens:,} in {text.windows:,} windows of {text.length:,}",
            "seconds": report.seconds,
            **report.versions,
        },
    )


def sentence(report: EvaluationReport) -> str:
    """Return the result in one or two sentences: the candidate closest to the float model, and the smallest one."""
    known = [(target, target.kl) for target in report.targets if target.kl is not None]
    if not known:
        best = min(report.targets, key=lambda target: target.perplexity)
        among = "" if len(report.targets) == 1 else f", the lowest of {len(report.targets)} candidates"
        return f'"{best.name}" has a perplexity of {number(best.perplexity)}{among}.'
    equal = [target.name for target, kl in known if kl.mean == 0]
    lossy = [(target, kl) for target, kl in known if kl.mean != 0]
    same = f" Equal to the float model: {', '.join(map(_quoted, equal))}." if equal else ""
    if not lossy:
        return same.strip()

    def kept(kl: Divergence) -> str:
        return f"the same most likely token for {percent(kl.top1)} of tokens, KL {number(kl.mean, 3)} nats per token"

    closest, its = min(lossy, key=lambda item: item[1].mean)
    smallest, lost = min(lossy, key=lambda item: item[0].stored_bytes)
    if len(lossy) == 1:
        return f'"{closest.name}" beside the float model: {kept(its)}.{same}'
    if closest is smallest:
        return f'Smallest and closest to the float model is "{closest.name}": {kept(its)}.{same}'
    return (
        f'Closest to the float model is "{closest.name}": {kept(its)}. Smallest, with '
        f'{format_size(smallest.stored_bytes)}, is "{smallest.name}": {kept(lost)}.{same}'
    )


def _quoted(name: str) -> str:
    return f'"{name}"'


def _size_and_loss(report: EvaluationReport) -> Figure | None:
    """Return the chart of KL over bits per weight."""
    points = [
        Point(
            target.name,
            target.bits_per_weight,
            target.kl.mean,
            f"{target.name}: {format_size(target.stored_bytes)}, {number(target.bits_per_weight, 3)} bits per weight, "
            f"KL {number(target.kl.mean, 3)} nats per token",
        )
        for target in report.targets
        if target.kl is not None and target.bits_per_weight is not None
    ]
    return scatter_chart(
        "KL divergence from the float model by size",
        points,
        frontier([(point.x, point.y) for point in points]),
        x_label="bits per weight, as stored; further left is smaller",
        y_label="KL divergence, nats per token; lower is better",
        best="no other candidate is both smaller and closer to the float model",
        other="another candidate is both",
        floor=1e-9,
    )


def _caches(report: EvaluationReport) -> list[tuple[str, Estimate, float]]:
    """Return the candidates with a quantised KV cache: name, KL added by the cache, and KL with a float32 cache."""
    bases = {target.target: target.kl.mean for target in report.targets if target.kl and target.kv == "float32"}
    return [
        (target.name, target.kv_loss, bases[target.target]) for target in report.targets if target.kv_loss is not None
    ]


def _short(target: TargetResult) -> str:
    """Return the name without the type of the cache."""
    return target.name.removesuffix(f", {target.kv} cache")


def _layers(report: EvaluationReport) -> tuple[list[Figure | None], list[str]]:
    """Return the charts of the layers, and the names of the candidates without an error in any layer."""
    # All caches of a bundle share one measurement of the layers. A logarithmic axis cannot show an error of zero.
    shown = {target.target: target for target in reversed(report.targets) if target.layers}
    targets = [target for target in reversed(shown.values()) if any(layer.error > 0 for layer in target.layers or ())]
    every = [layer.error for target in targets for layer in target.layers or ()]
    charts = []
    for start in range(0, len(targets), STYLES):
        errors, same = [], []
        for style, target in enumerate(targets[start : start + STYLES], 1):
            layers = target.layers or ()
            errors.append(Series(_short(target), style, [e.layer for e in layers], [e.error for e in layers]))
            routed = [(e.layer, e.same_experts) for e in layers if e.same_experts is not None]
            same.append(Series(_short(target), style, [layer for layer, _ in routed], [share for _, share in routed]))
        charts.append(
            line_chart(
                "Error of the residual stream after each layer, median over tokens",
                errors,
                x_label="layer (emb.: the embedding)",
                y_label="relative error; lower is better",
                log=True,
                x_names={-1: "emb."},
                scale=every,
            )
        )
        charts.append(
            line_chart(
                "Tokens for which the router chose exactly the float model's experts",
                same,
                x_label="layer",
                y_label="share of tokens; higher is better",
                share=True,
            )
        )
    exact = [_short(target) for target in reversed(shown.values()) if target not in targets]
    return charts, exact


def _expert_map(name: str, errors: ExpertErrors, tokens: tuple[tuple[int, ...], ...], scale: Scale) -> Figure | None:
    """Return the heat map of the error of each expert; None where no expert has an error."""
    if not errors.worst:
        return None
    tips = [
        [
            f"layer {layer}, expert {expert}: {number(value)}, {tokens[layer][expert]:,} tokens"
            for expert, value in enumerate(row)
        ]
        for layer, row in enumerate(errors.error)
    ]
    title = f"{name}: error of each expert, at most {number(errors.worst[0].error, 3)}"
    return heat_map(title, errors.error, tips, scale, row_name="layers", column_name="experts")
