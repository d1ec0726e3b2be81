"""`edgelm run`: continue a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgelm.cli.common.help import option, verb
from edgelm.cli.common.options import BUNDLE, PATH, loading_options, sampling_options
from edgelm.cli.common.prompt_cache import PromptCache, prompt_cache_option

_HINT = 'the prompt is the second argument: edgelm run BUNDLE "PROMPT"'


@verb(
    example='edgelm run olmoe "Once upon a time" --max-tokens 64',
    hints={"-p": _HINT, "--prompt": _HINT},
)
@click.argument("bundle", type=BUNDLE)
@click.argument("prompt", required=False)
@option("--chat", "as_chat", is_flag=True, help="Take PROMPT as a message and apply the model's chat template.")
@option("--system", metavar="TEXT", help="System message. Needs --chat.")
@option(
    "--messages",
    metavar="FILE",
    type=PATH,
    help='Conversation to answer in place of PROMPT, as JSON: [{"role": "user", "content": "Hello"}, ...].',
)
@prompt_cache_option
@option("--prompt-cache-all", is_flag=True, help="Save the generated tokens in FILE as well. Needs --prompt-cache.")
@sampling_options(temperature=0.0)
@loading_options
@option("-q", "--quiet", is_flag=True, help="Do not print the line about speed.")
@option("--json", "as_json", is_flag=True, help="Print one JSON document at the end in place of the text.")
def run(
    bundle: Path,
    prompt: str | None,
    as_chat: bool,
    system: str | None,
    messages: Path | None,
    prompt_cache: Path | None,
    prompt_cache_all: bool,
    loading: dict[str, Any],
    sampling: dict[str, Any],
    quiet: bool,
    as_json: bool,
) -> None:
    """Generate text that continues PROMPT with the model in BUNDLE.

    PROMPT "-" reads standard input. The text goes to standard output, its speed to standard error. Ctrl-C stops.
    """
    import json
    import sys

    from edgelm.cli.common.output import generation_json, timings_line, write_answer
    from edgelm.tokenization.chat_template import read_messages
    from edgelm.tokenization.template_sandbox import start_for

    if messages is None and prompt is None:
        raise click.UsageError("Missing argument 'PROMPT' (or --messages FILE)")
    if messages is not None and (prompt is not None or as_chat or system is not None):
        raise click.UsageError("--messages is the whole conversation: leave PROMPT, --chat and --system out")
    if system is not None and not as_chat:
        raise click.UsageError("--system needs --chat: without a chat template there is no system message")
    if prompt_cache_all and prompt_cache is None:
        raise click.UsageError("--prompt-cache-all needs --prompt-cache FILE")
    kept = None
    if prompt_cache is not None:
        kept = PromptCache(prompt_cache, bundle, everything=prompt_cache_all, quiet=quiet)
    text = sys.stdin.read() if prompt == "-" else prompt or ""
    talk: Any = None
    if messages is not None:
        talk = read_messages(messages)
    elif as_chat:
        talk = [{"role": "user", "content": text}]
        talk = talk if system is None else [{"role": "system", "content": system}, *talk]
    plain = messages is None and not as_chat
    if not plain:
        start_for(bundle)  # meanwhile the rest is imported
    from edgelm.generation.language_model import load

    with load(bundle, chat=not plain, **loading) as model:
        if kept is not None:
            kept.load(model)
        stream = model.stream(text, **sampling) if plain else model.chat_stream(talk, **sampling)
        computed = False
        try:
            for piece in stream:
                if not as_json:
                    write_answer(piece)
            computed = True
        except KeyboardInterrupt:
            stream.close()
            computed = True  # the prompt at least, or nothing
            raise
        finally:
            generation = stream.generation
            if as_json:
                click.echo(json.dumps(generation_json(generation)))
            elif generation.text:
                click.echo()
            if not quiet:
                click.echo(timings_line(generation), err=True)
            if kept is not None and computed:
                if "seed" in sampling:
                    kept.explain_seed(model, generation.timings.reused_tokens)
                kept.save(model)
