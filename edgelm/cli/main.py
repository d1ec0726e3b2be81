"""The `edgelm` command: find the verb, and turn errors into one line and an exit code.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted (Ctrl-C or SIGTERM). An unexpected error is a bug: it
prints one line as well, which asks for a report.
"""

from __future__ import annotations

import difflib
import importlib
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import click

from edgelm.cli.common.interrupts import INTERRUPTED, Raised, leave_at_once
from edgelm.errors import EdgeLMError
from edgelm.version import __version__

# The help is here too, so that `edgelm --help` imports no verb.
GROUPS = {
    "Make a bundle": {
        "export": "Export a checkpoint to a bundle that a device can run.",
        "quantize": "Quantise a checkpoint to a smaller checkpoint.",
        "recipe": "Choose the bits of each matrix, and write a recipe.",
        "build": "Build a TensorRT engine and add it to a bundle.",
        "synth": "Write a checkpoint with random weights, to measure with.",
    },
    "Use it": {
        "run": "Generate text that continues a prompt.",
        "chat": "Chat with a model.",
        "serve": "Serve models over HTTP with an API like OpenAI's.",
        "batch": "Answer a file of requests, as of OpenAI's batches.",
        "install": "Copy a bundle to where an app loads it, and check it.",
        "package": "Write a kit: a bundle and what runs it on a device offline.",
    },
    "Check and measure": {
        "parity": "Check that this device computes the same model as the reference.",
        "compare": "Compare reports of several devices, builds or recipes.",
        "inspect": "Describe a bundle or a checkpoint.",
        "bench": "Measure load time, speed and memory.",
        "eval": "Measure how close quantised models are to the float model.",
        "harness": "Run tasks of lm-evaluation-harness on a bundle.",
    },
    "This machine": {
        "doctor": "Show what EdgeLM can do here, or whether a model fits.",
        "demo": "Export, run and check the tiny models of a checkout.",
    },
}
VERBS = {verb: summary for verbs in GROUPS.values() for verb, summary in verbs.items()}
EXAMPLE = """\
edgelm export allenai/OLMoE-1B-7B-0924 -o olmoe
edgelm parity olmoe
edgelm run olmoe "Once upon a time\""""
ALIASES = {"quantise": "quantize"}


class Terminated(KeyboardInterrupt):
    """SIGTERM was received. Unlike Ctrl-C it also ends an interactive command."""


class Failure(click.ClickException):
    """An error of the user's input or machine, printed as one line."""

    def format_message(self) -> str:
        """Return the message in one line, with control characters escaped: it may hold names from untrusted files."""
        lines = (line.strip() for line in self.message.splitlines())
        return "".join(
            letter if letter.isprintable() else letter.encode("unicode_escape", "surrogatepass").decode()
            for letter in " ".join(line for line in lines if line)
        )

    def show(self, file: Any = None) -> None:
        """Print it on standard error."""
        click.echo(f"edgelm: error: {self.format_message()}", file=file, err=file is None)


class VerbGroup(click.Group):
    """A group that imports a verb's module only when the verb is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the verbs in the order of the help."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the verb's command, which has the verb's name in the module `edgelm.cli.<verb>`."""
        verb = ALIASES.get(cmd_name, cmd_name)
        if verb not in VERBS:
            return None
        command = getattr(importlib.import_module(f"edgelm.cli.{verb}"), verb)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Resolve the verb as click does; for an unknown verb suggest the closest one."""
        if args[0] not in VERBS and args[0] not in ALIASES and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0].lower(), [*VERBS, *ALIASES], n=1)
            what = f"did you mean {near[0]!r}?" if near else "`edgelm --help` lists them"
            raise click.UsageError(f"no such command {args[0]!r}: {what}", ctx)
        return super().resolve_command(ctx, args)

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write what the program does, and the example."""
        from edgelm.cli.common.help import write_example

        super().format_help_text(ctx, formatter)
        write_example(formatter, EXAMPLE)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the verbs by groups, importing none, and then the options."""
        from edgelm.cli.common.help import write_sections

        options = [record for param in self.get_params(ctx) if (record := param.get_help_record(ctx))]
        write_sections(
            formatter, {**{title: list(verbs.items()) for title, verbs in GROUPS.items()}, "Options": options}
        )

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb; the module's docstring says what happens to errors."""
        debug = bool(ctx.params.get("debug"))
        try:
            with Raised():
                return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            # click handles these itself; after a broken pipe it exits quietly.
            raise
        except BaseException as error:
            stopped = _interruption(error)
            if stopped is None and not isinstance(error, (EdgeLMError, OSError, MemoryError)):
                raise
            if debug:
                traceback.print_exc()
            if stopped is None:
                raise Failure(str(error) or "not enough memory") from error
            click.echo("terminated" if isinstance(stopped, Terminated) else "interrupted", err=True)
            ctx.exit(INTERRUPTED)

    def main(self, args: Sequence[str] | None = None, *more: Any, **extra: Any) -> Any:
        """Run the command line as click does, and report unexpected errors; `standalone_mode=False` raises them."""
        try:
            return super().main(args, *more, **extra)
        except (SystemExit, KeyboardInterrupt, click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except BaseException as error:  # a panic in Rust code is not an Exception
            if not extra.get("standalone_mode", True):
                raise
            given = sys.argv[1:] if args is None else args
            if "--debug" in _before_verb(given):
                traceback.print_exc()
            Failure(_unexpected(error)).show()
            sys.exit(1)


def _interruption(error: BaseException) -> KeyboardInterrupt | None:
    """Return the KeyboardInterrupt that led to this error, None if none did: packages may catch it on import."""
    found: BaseException | None = error
    seen: set[int] = set()  # an error may be its own cause's context
    while found is not None and id(found) not in seen:
        if isinstance(found, KeyboardInterrupt):
            return found
        seen.add(id(found))
        found = found.__cause__ or found.__context__
    return None


def _before_verb(arguments: Sequence[str]) -> Sequence[str]:
    """Return the arguments before the verb."""
    verb = next((place for place, argument in enumerate(arguments) if not argument.startswith("-")), len(arguments))
    return arguments[:verb]


def _unexpected(error: BaseException) -> str:
    """Return the message for an unexpected error."""
    said = str(error)
    what = f"{type(error).__name__}: {said[:300]}" if said else type(error).__name__
    if isinstance(error, ImportError) and not (error.name or "").startswith("edgelm"):
        return f"a package that EdgeLM needs cannot be imported ({what}): install it again, `edgelm doctor` tells more"
    return f"unexpected {what}; this is a bug: run it again as `edgelm --debug VERB ...` and report what it prints"


@click.group(cls=VerbGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="edgelm", message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Quantise a language model, export it to a bundle, run it on a device, and check that it still computes the same.

    `edgelm COMMAND --help` shows the options of a command.
    """
    del debug  # read by VerbGroup.invoke


def _terminate(*_: object) -> None:
    raise Terminated


def main() -> None:
    """Run the command line and exit; called by `edgelm.__main__`."""
    leave_at_once()
    signal.signal(signal.SIGTERM, _terminate)
    for stream in (sys.stdout, sys.stderr):
        # Generated text may hold characters that a terminal's encoding lacks; they must not end the program.
        if hasattr(stream, "reconfigure"):
            # UTF-8 as on other systems, also in a file or pipe, for which Windows has an encoding of the country.
            encoding = "utf-8" if sys.platform == "win32" else None
            stream.reconfigure(encoding=encoding, errors="replace")
    cli(prog_name="edgelm")
