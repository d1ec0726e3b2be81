"""The evaluation as one HTML file that needs nothing else."""

from __future__ import annotations

from html import escape
from pathlib import Path

from edgelm.evaluation.result import Divergence, EvaluationReport, ExpertErrors, TargetResult, frontier
from edgelm.files import atomic_file
from edgelm.pages.charts import STYLES, Series, line_chart
from edgelm.pages.heat import Scale, heat_map, scale_legend
from edgelm.pages.numbers import estimate, number, percent
from edgelm.pages.page import REPORT, Cell, Column, Html, device_facts, document, facts_table, files_table, table
from edgelm.pages.plots import Point, scatter_chart
from edgelm.sizes import format_size


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
    created = report.created.replace("T", " ").replace("+00:00", " UTC")
    against = ""
    if report.reference is not None:
        against = (
            " KL is KL(float model || candidate) in nats per token, over the whole vocabulary: 0 where both give the "
            "same probabilities. ± is the standard error over windows."
        )
    return (
        f"<h1>Evaluation of {escape(report.model)}</h1>"
        f'<p class="answer">{escape(sentence(report))}</p>'
        f"<p>{escape(str(report.device.get('cpu', '')))} · {escape(created)}</p>"
        f'<p class="soft">Measured on {text.tokens:,} tokens of <code>{escape(text.name)}</code>, in {text.windows:,} '
        f"independent windows of {text.length:,}.{against}</p>{notes}"
    )


def sentence(report: EvaluationReport) -> str:
    """The outcome in plain words: which candidate is closest to the float model, and what the smallest loses."""
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


def _table(report: EvaluationReport) -> str:
    names = (
        *("Size ↓", "Bits per weight ↓", "KL mean ↓", "KL median ↓", "KL p99 ↓", "Top token same ↑", "Perplexity ↓"),
        *("Prefill, tokens/s ↑", "Decode, tokens/s ↑", "Peak memory ↓"),
    )
    columns = (Column("Candidate", "long"), *(Column(name, "num") for name in names))
    rows: list[tuple[Cell, ...]] = []
    if report.reference is not None:
        reference = report.reference
        sizes = (format_size(reference.stored_bytes), number(reference.bits_per_weight, 3))
        cells = (*sizes, *("",) * 4, number(reference.perplexity), *("",) * 3)
        rows.append((_name("float model", "as stored, computed in float32"), *cells))
    rows += [(_name(target.name, f"{target.kind}, {target.arithmetic}"), *_cells(target)) for target in report.targets]
    notes = dict.fromkeys(f"{target.target}: {note}" for target in report.targets for note in target.notes)
    said = "".join(f'<p class="soft">{escape(note)}</p>' for note in notes)
    legend = '<p class="soft">↓ lower is better, ↑ higher is better.</p>'
    return f"<h2>Candidates</h2>{legend}{table('Candidates', columns, rows)}{said}"


def _cells(target: TargetResult) -> list[str]:
    kl, speed = target.kl, target.speed
    divergence = ["", "", "", ""]
    if kl is not None:
        divergence = [estimate(kl.mean, kl.standard_error), number(kl.median, 2), number(kl.p99, 2), percent(kl.top1)]
    fast = ["", "", ""]
    if speed is not None:
        rates = (speed.prefill_tokens_per_second, speed.decode_tokens_per_second)
        fast = [*(number(rate, 3) for rate in rates), format_size(speed.peak_memory)]
    size = [format_size(target.stored_bytes), number(target.bits_per_weight, 3)]
    return [*size, *divergence, number(target.perplexity), *fast]


def _name(name: str, how: str) -> Html:
    return Html(f'{escape(name)}<br><span class="soft">{escape(how)}</span>')


def _frontier(report: EvaluationReport) -> str:
    """KL against size: bits per weight, which a float model always comes with."""
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
    if not points:
        return ""
    chart = scatter_chart(
        "KL divergence from the float model by size",
        points,
        frontier([(point.x, point.y) for point in points]),
        x_label="bits per weight, as stored; further left is smaller",
        y_label="KL divergence, nats per token; lower is better",
        best="no other candidate is both smaller and closer to the float model",
        other="another one is both",
        floor=1e-9,
    )
    return f"<h2>Size and loss</h2>{chart}"


def _caches(report: EvaluationReport) -> str:
    bases = {target.target: target.kl.mean for target in report.targets if target.kl and target.kv == "float32"}
    rows = []
    for target in report.targets:
        if target.kv_loss is not None:
            base, lost = bases[target.target], target.kv_loss
            rows.append(
                (
                    target.name,
                    estimate(lost.mean, lost.standard_error, 2),
                    percent(lost.mean / base) if base > 0 else "-",
                )
            )
    if not rows:
        return ""
    columns = (
        *(Column("Candidate", "long"), Column("KL above that with a float32 cache, nats per token ↓", "num")),
        Column("Share of that KL ↓", "num"),
    )
    return f"<h2>What the cache costs</h2>{table('Caches', columns, rows)}"


def _short(target: TargetResult) -> str:
    """The name without the cache's type."""
    return target.name.removesuffix(f", {target.kv} cache")


def _layers(report: EvaluationReport) -> str:
    # The layers are computed once for all caches of a bundle. What has no error has no place on a logarithmic axis.
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
    said = f'<p class="soft">No error in any layer: {escape(", ".join(exact))}.</p>' if exact else ""
    return f"<h2>Layers</h2>{said}{''.join(charts)}" if shown else ""


def _experts(report: EvaluationReport) -> str:
    measured = [(target, target.experts) for target in report.targets if target.experts is not None]
    if not measured or report.reference is None or report.reference.expert_tokens is None:
        return ""
    tokens = report.reference.expert_tokens
    scale = Scale.of(value for _, errors in measured for row in errors.error for value in row)
    parts = [
        '<h2>Experts</h2><p class="soft">Relative squared error of each expert\'s output, on the tokens that the float '
        "model gives it: what quantising its own weights costs. Lower is better. All maps below have this one scale, "
        "which is logarithmic:</p>",
        scale_legend(scale, zero="0, exact", missing="got no token"),
    ]
    for target, errors in measured:
        if not errors.worst:
            parts.append(f"<p>{escape(target.name)}: every expert is as in the float model.</p>")
            continue
        tips = [
            [
                f"layer {layer}, expert {expert}: {number(value)}, {tokens[layer][expert]:,} tokens"
                for expert, value in enumerate(row)
            ]
            for layer, row in enumerate(errors.error)
        ]
        title = f"{target.name}: error of each expert, at most {number(errors.worst[0].error, 3)}"
        parts.append(heat_map(title, errors.error, tips, scale, row_name="layers", column_name="experts"))
        parts.append(_worst(target.name, errors))
    return "".join(parts)


def _worst(name: str, errors: ExpertErrors) -> str:
    columns = (Column("Expert"), Column("Relative squared error", "num"), Column("Tokens", "num"))
    rows = [
        (f"layer {worst.layer}, expert {worst.expert}", number(worst.error, 3), f"{worst.tokens:,}")
        for worst in errors.worst
    ]
    return f"<details><summary>The worst experts of {escape(name)}</summary>{table('Experts', columns, rows)}</details>"


def _facts(report: EvaluationReport) -> str:
    text, reference = report.text, report.reference
    run: dict[str, object] = {
        "text": text.name,
        "SHA-256 of the text": text.sha256,
        "tokens": f"{text.tokens:,} in {text.windows:,} windows of {text.length:,}",
        "seconds": report.seconds,
        **report.versions,
    }
    parts = [
        f"<h2>Text and versions</h2>{facts_table('Text and versions', run)}"
        f"<h2>Device</h2>{facts_table('Device', device_facts(report.device))}",
        "<h2>Files</h2>",
    ]
    if reference is not None:
        parts.append(f"<h3>float model, {escape(reference.checkpoint)}</h3>{files_table('Files', reference.files)}")
    seen: set[str] = set()
    for target in report.targets:
        if target.target not in seen:
            parts.append(
                f"<h3>{escape(target.target)}, recipe {escape(str(target.recipe))}</h3>"
                f"{files_table('Files', target.files)}"
            )
        seen.add(target.target)
    return "".join(parts)
