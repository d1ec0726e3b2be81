"""Whether a model fits on this machine or a board, how fast it will be, and the next command to type."""

from __future__ import annotations

import importlib.util
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgelm.cli.common.options import EXPORT_PACKAGES, as_usage

if TYPE_CHECKING:
    from edgelm.preflight.assess import Option, Question
    from edgelm.preflight.boards import Board
    from edgelm.preflight.predict import Prediction, Range
    from edgelm.preflight.subject import Subject
    from edgelm.quant.recipe import Recipe

_COMPARED = ("int4", "int8")


@dataclass(frozen=True)
class Preflight:
    """The answer to `edgelm doctor MODEL`.

    Attributes:
        subject: the model.
        question: what was asked.
        options: the recipes, the recommended kind first.
        commands: what to type next.
        notes: what a user should know.
    """

    subject: Subject
    question: Question
    options: tuple[Option, ...]
    commands: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether any of the recipes fits."""
        return self.best is not None

    @property
    def best(self) -> Option | None:
        """The recommended recipe."""
        from edgelm.preflight.assess import recommended

        return recommended(self.options)

    @property
    def place(self) -> str:
        """The machine or board, for people."""
        return "this machine" if self.question.board is None else self.question.board.title

    def as_dict(self) -> dict[str, Any]:
        """Return the answer for a JSON document."""
        subject, board = self.subject, self.question.board
        return {
            "kind": subject.kind,
            "model": subject.name,
            "family": subject.family,
            "fits": self.fits,
            "recommended": None if self.best is None else self.best.recipe,
            "checkpoint_bytes": subject.checkpoint_bytes,
            "download_bytes": subject.download_bytes,
            "board": None if board is None else {**vars(board), "available": board.available, "peak": board.peak},
            "options": [option.as_dict() for option in self.options],
            "refused": list(dict.fromkeys(reason for option in self.options for reason in option.refused)),
            "commands": list(self.commands),
            "notes": list(self.notes),
        }


def board_list(*, as_json: bool) -> str:
    """Return the table of boards."""
    import json

    from edgelm.cli.common.output import grid
    from edgelm.preflight.boards import boards

    if as_json:
        return json.dumps({name: {**vars(one), "available": one.available} for name, one in boards().items()})
    rows = [
        (name, one.title, f"{one.memory / (1 << 30):g} GiB", f"{one.bandwidth / 1e9:g} GB/s",
         "-" if one.peak is None else f"{one.peak / 1e9:,.0f} GOPS", one.target)
        for name, one in boards().items()
    ]  # fmt: skip
    return grid(("board", "", "memory", "bandwidth", "int8 peak", "target"), rows)


def examine_model(
    model: str,
    *,
    board: str | None,
    recipe: str | None,
    target: str | None,
    ops: str | None,
    context_length: int | None,
    kv: str | None,
    prompt_tokens: int,
    new_tokens: int,
    threads: int | None,
) -> Preflight:
    """Assess `model`; the arguments are the options of the verb.

    Raises:
        EdgeLMError: the model cannot be read.
        click.UsageError: there is no such board, or options contradict each other.
    """
    from edgelm.preflight.assess import Question, context_of
    from edgelm.preflight.boards import board as named
    from edgelm.preflight.subject import read_subject

    found: Board | None = None
    if board is not None:
        with as_usage():
            found = named(board)
        if threads is not None:
            raise click.UsageError("--threads is for this machine: for a board its fast cores are counted")
    subject = read_subject(model)
    if subject.kind == "bundle" and (recipe or target or ops):
        raise click.UsageError(
            "--recipe, --target and --ops are for checkpoints: a bundle has been exported with its own"
        )
    notes = [*subject.notes]
    if subject.manifest is not None:
        target, ops = subject.manifest.target, subject.manifest.ops
    target = target or (found.target if found is not None else _target_here())
    if ops is not None and subject.kind != "bundle" and target != "cpu":
        raise click.UsageError(f"--ops is for the target cpu, and this is for {target}: leave it out")
    if target == "cpu" and ops is None:
        ops, why = _operators(found)
        notes += why
    question = Question(
        target=target, ops=ops or "native", context=context_length, kv=kv, threads=threads,
        prompt_tokens=prompt_tokens, new_tokens=new_tokens, board=found,
    )  # fmt: skip
    if subject.decoder is None:
        return Preflight(subject, question, (_refused(subject),), (), tuple(notes))
    with as_usage():
        context_of(subject, context_length)
    options, more = _options(subject, question, recipe)
    notes += more
    made = Preflight(subject, question, options, (), ())
    notes += _cost(made) + _busy(made)
    return Preflight(subject, question, options, _commands(made), tuple(dict.fromkeys(notes)))


def _target_here() -> str:
    from edgelm.cli.preflight.machine import gpus

    return "tensorrt" if gpus()["devices"] else "cpu"


def _operators(board: Board | None) -> tuple[str, list[str]]:
    """Return the operator set for this machine or the board, and what to say about it."""
    from edgelm.cli.preflight.machine import native_operators

    if board is not None:
        if board.isa != "scalar":
            return "native", []
        why = f"portable operators: the cores of a {board.title} have no int8 dot products, which native ones need"
        return "portable", [why]
    found = native_operators()
    if found["instruction_set"]:
        return "native", []
    return "portable", [f"portable operators: {found['why']}"]


def _refused(subject: Subject) -> Option:
    from edgelm.preflight.assess import Option

    return Option("-", None, None, None, 0, None, None, subject.refused)


def _options(subject: Subject, question: Question, recipe: str | None) -> tuple[tuple[Option, ...], list[str]]:
    """Assess the recipes; return them and notes."""
    import shutil

    from edgelm.preflight.assess import assess
    from edgelm.quant.recipe import Recipe

    notes: list[str] = []
    subject, stored, scheme, more = _deeper(subject)
    notes += more
    if subject.manifest is not None:
        recipes = [Recipe.from_toml(subject.manifest.recipe.toml)]
    elif stored is not None:
        recipes = [stored]
    else:
        recipes = [Recipe.load(name) for name in ((recipe,) if recipe else _COMPARED)]
    free = None if question.board is not None else shutil.disk_usage(Path.cwd()).free
    options = [assess(subject, one, question, scheme=scheme, disk_free=free) for one in recipes]
    here = _not_here(subject, question)
    if here:
        from dataclasses import replace

        options = [replace(option, refused=(*option.refused, here)) for option in options]
    return tuple(options), notes


def _deeper(subject: Subject) -> tuple[Subject, Recipe | None, Any, list[str]]:
    """Look at the headers of a checkpoint's weights: what an export would refuse, its type, and its stored recipe."""
    from dataclasses import replace

    if not subject.has_weights:
        if subject.quantized:
            return (
                subject,
                None,
                None,
                ["the checkpoint is quantised already: download it and ask again for the sizes of its own recipe"],
            )
        return subject, None, None, []
    from edgelm.checkpoint import Checkpoint
    from edgelm.cli.inspect.checkpoint import checkpoint_document
    from edgelm.quant.source import WeightSource

    document = checkpoint_document(subject.folder)
    refused = tuple(dict.fromkeys((*subject.refused, *document["refused"])))
    named = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    floats = {named[key]: count for key, count in document["dtypes"].items() if key in named}
    dtype = max(floats, key=lambda name: floats[name], default=subject.dtype)
    subject = replace(subject, refused=refused, dtype=dtype)
    if not subject.quantized or document["recipe"] is None:
        return subject, None, None, []
    source = WeightSource(Checkpoint(subject.folder))
    return subject, source.recipe, source.scheme, []


def _not_here(subject: Subject, question: Question) -> str | None:
    """Return why a bundle that exists cannot run here; None if it can, or if a board is asked about."""
    from edgelm.cli.preflight.machine import gpus, native_operators

    board, target = question.board, question.target
    if board is not None:
        if target != board.target:
            again = "export it again with" if subject.kind == "bundle" else "ask with"
            return f"target {target}: {board.title} takes bundles for {board.target}: {again} --target {board.target}"
        return None
    if target != "cpu" and not gpus()["devices"]:
        return f"target {target}: this machine has no GPU that can be used ({gpus()['why']})"
    if subject.kind == "bundle" and target == "cpu" and question.ops == "native":
        found = native_operators()
        return None if found["instruction_set"] else f"native operators: {found['why']}"
    return None


def _cost(found: Preflight) -> list[str]:
    """Return what the larger recipe costs beside the recommended one."""
    by_name = {option.recipe: option for option in found.options}
    small, large = by_name.get("int4"), by_name.get("int8")
    if small is None or large is None or not small.fits:
        return []
    if not large.fits:
        return [f"int8 does not fit: {'; '.join(large.refused)}"]
    if small.memory is None or large.memory is None:
        return []
    said = f"int8 loses less quality and takes {large.memory.total / small.memory.total:.1f} times the memory"
    if small.prediction and large.prediction:
        said += f"; it decodes at {large.prediction.decode.value / small.prediction.decode.value:.0%} of the speed"
    return [said + ("" if large.comfortable else ", nearly all that there is")]


def _busy(found: Preflight) -> list[str]:
    """Return a note if other programs disturbed the measurement."""
    import os

    from edgelm.devices import allowed_cores

    measured = any(one.prediction is not None and one.prediction.source == "measured here" for one in found.options)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if not measured or load <= allowed_cores() + 1:
        return []
    return [f"the machine was busy (load {load:.1f}): ask again when it is quiet"]


def _export_memory(found: Preflight) -> int | None:
    """Return the memory that the export takes here; None where it is not known, or nothing is to be exported."""
    from edgelm.devices import allowed_cores

    best, subject = found.best, found.subject
    missing = [package for package in EXPORT_PACKAGES if importlib.util.find_spec(package) is None]
    if best is None or best.planned is None or subject.kind == "bundle" or subject.decoder is None or missing:
        return None
    from edgelm.export.memory import ASSUMED_BASE, needed_memory
    from edgelm.parity.golden import GoldenOptions

    options = GoldenOptions().resolved(subject.decoder)
    # About three letters are a token; the tokenizer may not be here.
    most, more = options.max_prompt_tokens or 0, options.greedy_tokens or 0
    lengths = [min(len(prompt.text) // 3, most) + more for prompt in options.prompts]
    tokens = sum(lengths) + sum(lengths[: options.rounded_prompts(subject.decoder)])
    width = subject.decoder.feed_forward_width
    return needed_memory(best.planned.info, width, tokens, allowed_cores(), ASSUMED_BASE)


def _commands(found: Preflight) -> tuple[str, ...]:
    """Return the commands to type next."""
    from edgelm.cli.main import VERBS
    from edgelm.installing import install_hint

    subject, best, board = found.subject, found.best, found.question.board
    if best is None:
        return ()
    if subject.kind == "bundle":
        path = shlex.quote(subject.name)
        return (f"edgelm parity {path}", f"edgelm bench {path}")
    name = Path(subject.name.partition("@")[0]).name.lower() + ("" if best.recipe == "-" else f"-{best.recipe}")
    out, extra = shlex.quote(name), ""
    if found.question.target != "cpu":
        extra += f" --target {found.question.target}"
        if board is not None and board.sm is not None:
            extra += f" --sm {board.sm} --matmul plugin --no-engines"
    elif found.question.ops == "portable":
        extra += " --ops portable"
    elif board is not None:
        extra += " --ops native"
    recipe = "" if subject.quantized else f" --recipe {shlex.quote(best.recipe)}"
    missing = [package for package in EXPORT_PACKAGES if importlib.util.find_spec(package) is None]
    lines = [install_hint("export")] if missing else []
    lines.append(f"edgelm export {shlex.quote(subject.name)} -o {out}{recipe}{extra}")
    if board is None:
        lines.append(f"edgelm bench {out}")
    elif "package" in VERBS and board.target == "cpu" and _platform(board) is not None:
        lines.append(f"edgelm package {out} -o {out}.tar.zst --for {_platform(board)}")
    return tuple(lines)


def _platform(board: Board) -> str | None:
    """Return the platform of a board's kit; None for phones and handhelds whose system decides."""
    if board.name.startswith(("pi", "orange")):
        return "linux-aarch64"
    if board.name.startswith("macbook"):
        return "macos-arm64"
    return "linux-x86_64" if board.name.startswith(("n100", "steam")) else None


def report(found: Preflight, *, verbose: bool) -> str:
    """Format the answer for people: a sentence, the table of recipes, and what to type next."""
    from edgelm.cli.common.output import grid, pairs

    table = grid(
        ("recipe", "bundle", "memory", "of it cache", "prefill", "decode", "fits"),
        [_row(option) for option in found.options],
    )
    rows = _facts(found)
    if verbose:
        rows += _parts(found)
    blocks = [sentence(found), table, pairs(rows)]
    if found.commands:
        blocks.append("Next\n" + "\n".join(f"  {line}" for line in found.commands))
    return "\n\n".join(blocks)


def sentence(found: Preflight) -> str:
    """Return the answer in one sentence."""
    from edgelm.sizes import format_size

    best, name = found.best, found.subject.name
    if best is None or best.memory is None:
        return f"{name} cannot run on {found.place}."
    left = "are free" if found.question.board is None else "its system leaves"
    free = "" if best.available is None else f" of the {format_size(best.available)} that {left}"
    text = f"{name} fits on {found.place}: {best.recipe} takes {format_size(best.memory.total)}{free}"
    if best.prediction is None:
        return f"{text}."
    rate = _digits(best.prediction.decode.value)
    return f"{text}, and {'will' if found.question.board is None else 'may'} generate about {rate} tokens/s."


def _row(option: Option) -> tuple[str, ...]:
    from edgelm.preflight.fit import disk_bytes
    from edgelm.sizes import format_size

    def rate(value: Range | None) -> str:
        return "unknown" if value is None else f"{_digits(value.value)} ({_digits(value.low)} to {_digits(value.high)})"

    prediction = option.prediction
    size = "-" if option.planned is None else format_size(disk_bytes(option.planned))
    memory = "-" if option.memory is None else format_size(option.memory.total)
    cache = "-" if option.memory is None else format_size(option.memory.cache)
    fits = "yes" if option.comfortable else "yes, tight" if option.fits else "no"
    prefill, decode = (None, None) if prediction is None else (prediction.prefill, prediction.decode)
    return option.recipe, size, memory, cache, rate(prefill), rate(decode), fits


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _count(value: float) -> str:
    return f"{value / 1e9:.2f} billion" if value >= 1e9 else f"{value / 1e6:.3g} million"


def _facts(found: Preflight) -> list[tuple[str, str]]:
    from edgelm.sizes import format_size

    subject, best = found.subject, found.best
    rows = [("model", _model(subject))]
    if subject.kind == "hub":
        done = (
            "all of it is here" if not subject.download_bytes else f"{format_size(subject.download_bytes)} to download"
        )
        rows.append(("checkpoint", f"{format_size(subject.checkpoint_bytes)}, {done}"))
    elif subject.checkpoint_bytes is not None:
        rows.append(("checkpoint", format_size(subject.checkpoint_bytes)))
    option = best or found.options[0]
    if option.memory is not None:
        longest = f"the longest that fits is {option.longest_context:,}" if option.longest_context else "none fits"
        rows.append(("context", f"{option.memory.context:,} tokens; {longest}"))
    if option.prediction is not None:
        rows += _bounds(option.prediction, option.recipe)
    elif option.unknown is not None:
        rows.append(("speed", f"not known: {option.unknown}"))
    export = _export_memory(found)
    if export is not None:
        rows.append(("export", f"takes up to {format_size(export)} of memory, on the machine where it runs"))
    board = found.question.board
    if board is not None:
        rows.append(("source", board.source))
    rows += [("note", note) for note in found.notes]
    return [*rows, *(("REFUSED", reason) for reason in _reasons(found))]


def _reasons(found: Preflight) -> list[str]:
    """Return why nothing fits; those of all recipes once, the others with the recipe's name."""
    if found.best is not None:
        return []
    shared = [reason for reason in found.options[0].refused if all(reason in one.refused for one in found.options)]
    own = [f"{one.recipe}: {reason}" for one in found.options for reason in one.refused if reason not in shared]
    return [*shared, *own]


def _model(subject: Subject) -> str:
    decoder = subject.decoder
    if decoder is None:
        return f"{subject.name}: not supported"
    weights = sum(matrix.rows * matrix.columns for matrix in decoder.matrices.values())
    experts = f", {decoder.active_experts} of {decoder.num_experts} experts per token" if decoder.num_experts else ""
    return f"{subject.family}, {_count(weights)} weights in {decoder.num_layers} layers{experts}"


def _bounds(prediction: Prediction, recipe: str) -> list[tuple[str, str]]:
    """Return what limits each phase."""
    from edgelm.sizes import format_size

    measured = prediction.source == "measured here"
    how = f"measured here, {prediction.threads} thread{'s' * (prediction.threads > 1)}" if measured else "expected"
    rows = [
        (
            f"decode {recipe}",
            f"memory: {format_size(prediction.bytes_per_token)} per token at "
            f"{format_size(prediction.read_bandwidth)}/s, {how}",
        )
    ]
    if prediction.throughput is not None and prediction.first_token is not None:
        rows.insert(
            0,
            (
                f"prefill {recipe}",
                f"arithmetic: {_count(prediction.operations)} operations per token at "
                f"{prediction.throughput / 1e9:,.0f} billion/s, {how}; first token after "
                f"{prediction.first_token.value:.2f} s",
            ),
        )
    asked = (
        f"a prompt of {prediction.prompt_tokens:,} tokens and {prediction.new_tokens:,} new ones, {prediction.kv} cache"
    )
    return [("speed", f"tokens/s for {asked}"), *rows, *(("note", note) for note in prediction.notes)]


def _parts(found: Preflight) -> list[tuple[str, str]]:
    rows = []
    for option in found.options:
        if option.prediction is not None:
            for phase, parts in option.prediction.parts.items():
                said = ", ".join(f"{name} {1e3 * seconds:,.1f} ms" for name, seconds in parts.items())
                rows.append((f"{phase} {option.recipe}", said))
    return rows
