"""`--help` of a verb: what it does, one example, and its options under headings."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


class Group(enum.Enum):
    """Headings of options, in the order in which help shows them."""

    COMMON = "Options"
    SAMPLING = "Sampling"
    CALIBRATION = "Calibration: choose quantised values with a text"
    MIXED = "Mixed precision: more bits for the matrices that need them"
    TEXT = "Evaluation text"
    ACCESS = "Who may use the server"
    LIMITS = "Limits of a request"
    PARITY = "Parity pack: the reference results stored in the bundle"
    RUNTIME = "Runtime"
    RESOURCES = "Threads and memory"
    CLUSTER = "More than one machine"
    EXPERT = "Expert options"
    GPU = "GPU"
    TENSORRT = "GPU, with --target tensorrt"


class Option(click.Option):
    """An option with the heading that help shows it under.

    Args:
        group: the heading.
        default_text: the default in words, where it is not one value.
        old_names: earlier names, which still work and which help does not show.
        settings: click's.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        group: Group = Group.COMMON,
        default_text: str | None = None,
        old_names: Sequence[str] = (),
        **settings: Any,
    ) -> None:
        self.group = group
        self.default_text = default_text
        self.shown = [name for name in names if name.startswith("-")]
        default = settings.get("default")
        if default_text is None and default is not None and not settings.get("is_flag"):
            self.default_text = f"{default:g}" if isinstance(default, float) else str(default)
        super().__init__([*names, *old_names], **settings)

    def get_help_record(self, ctx: click.Context) -> tuple[str, str]:
        """The names with the value's placeholder; what the option does with its default."""
        del ctx
        short_first = sorted(self.shown, key=lambda name: name.startswith("--"))
        names = ", ".join(name.replace("/", " / ") for name in short_first)
        notes = ["required"] if self.required else []
        notes += [f"default: {self.default_text}"] if self.default_text is not None else []
        noted = f" [{'; '.join(notes)}]" if notes else ""
        return f"{names} {self.placeholder}".rstrip(), f"{self.help or ''}{noted}"

    @property
    def placeholder(self) -> str:
        """What stands for the option's value; empty for a flag."""
        if self.is_flag:
            return ""
        if self.metavar is not None:
            return self.metavar
        if isinstance(self.type, click.Choice):
            return "|".join(map(str, self.type.choices))
        return "N" if isinstance(self.type, click.IntRange) else "X"


def option(*names: str, **settings: Any) -> Callable[[F], F]:
    """Add an `Option` to a verb; see there for the settings."""
    return click.option(*names, cls=Option, **settings)


class Verb(click.Command):
    """A command whose help has an example and headings.

    Args:
        example: a command line that works, beginning with `edgelm`; it may take several lines.
        hints: what to do in place of options that do not exist, by the option's name.
    """

    def __init__(self, *args: Any, example: str, hints: Mapping[str, str] | None = None, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.example = example
        self.hints = hints or {}

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments. Raises `click.UsageError`, with the hint for an option that does not exist."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if error.option_name not in self.hints:
                raise
            raise click.UsageError(
                f"No such option {error.option_name!r}: {self.hints[error.option_name]}", ctx
            ) from None

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write what the verb does, and the example."""
        super().format_help_text(ctx, formatter)
        write_example(formatter, self.example)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, each under the heading of its group."""
        grouped: dict[Group, list[tuple[str, str]]] = {group: [] for group in Group}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record is not None:
                grouped[getattr(param, "group", Group.COMMON)].append(record)
        write_sections(formatter, {group.value: rows for group, rows in grouped.items()})


def verb(example: str, **settings: Any) -> Callable[[Callable[..., Any]], Verb]:
    """Make a verb of a function; `settings` are `click.command`'s."""
    return click.command(cls=Verb, example=example, **settings)


def write_example(formatter: click.HelpFormatter, example: str) -> None:
    """Write `example` under a heading, as it is: a command that is wrapped cannot be copied."""
    with formatter.section("Example"):
        for line in example.splitlines():
            formatter.write(f"{'':>{formatter.current_indent}}{line}\n")


def write_sections(
    formatter: click.HelpFormatter, sections: dict[str, list[tuple[str, str]]], widest: int = 26
) -> None:
    """Write two columns a section, aligned with one another; empty sections are left out.

    Longer cells than `widest` stand on a line of their own.
    """
    cells = [first for rows in sections.values() for first, _ in rows]
    width = max((len(cell) for cell in cells if len(cell) <= widest), default=widest)
    for title, rows in sections.items():
        if rows:
            with formatter.section(title):
                formatter.write_dl([(f"{first:<{width}}", second) for first, second in rows], col_max=width)
