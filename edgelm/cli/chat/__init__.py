"""`edgelm chat`: chat with a model in a terminal."""

from __future__ import annotations

import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import click

from edgelm.cli.common.help import option, verb
from edgelm.cli.common.options import BUNDLE, loading_options, sampling_options
from edgelm.cli.common.prompt_cache import PromptCache, prompt_cache_option


@verb(example="edgelm chat olmoe")
@click.argument("bundle", type=BUNDLE)
@option("--system", metavar="TEXT", help="System message.")
@option(
    "--no-trim",
    is_flag=True,
    help="Refuse a message that does not fit into the context; do not drop the oldest turns.",
)
@option("--no-history", is_flag=True, help="Do not save what is typed for the arrow keys of later sessions.")
@prompt_cache_option
@sampling_options(temperature=0.7)
@loading_options
@option("-q", "--quiet", is_flag=True, help="Do not print lines about speed.")
def chat(
    bundle: Path,
    system: str | None,
    no_trim: bool,
    no_history: bool,
    prompt_cache: Path | None,
    loading: dict[str, Any],
    sampling: dict[str, Any],
    quiet: bool,
) -> None:
    """Chat with the model in BUNDLE.

    A line is a message; so is a paste, and the text between two \"\"\". /help lists the commands, Ctrl-C stops an
    answer, Ctrl-D ends. Messages can be piped in: then only the answers are printed, and the exit code is 1 if one
    failed.
    """
    from edgelm.tokenization.template_sandbox import start_for

    start_for(bundle)  # meanwhile the rest is imported
    from edgelm.cli.chat.input import History, piped_entries, typed_entries
    from edgelm.cli.chat.session import WELCOME, Screen, Session
    from edgelm.generation.language_model import load

    screen, kept = Screen(), None
    if prompt_cache is not None:
        kept = PromptCache(prompt_cache, bundle, everything=True, quiet=quiet)
    with load(bundle, **loading) as model:
        if kept is not None:
            kept.load(model)
        session = Session(model, screen, sampling, system=system, trim=not no_trim, quiet=quiet)
        terminal = sys.stdin is not None and sys.stdin.isatty()
        if terminal:
            screen.info(WELCOME)
            history = None if no_history else History.default()
            read = typed_entries(history, lambda prompt: screen.style(prompt, fg="cyan", bold=True))
        else:
            read = piped_entries(BytesIO() if sys.stdin is None else sys.stdin.buffer)
        session.run(read, terminal=terminal)
        if kept is not None:
            kept.save(model)
        if session.failed and not terminal:
            click.get_current_context().exit(1)
