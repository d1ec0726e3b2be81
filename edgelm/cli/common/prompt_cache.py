"""--prompt-cache: a file that keeps the KV cache of a prompt for later runs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgelm.cli.common.help import option
from edgelm.cli.common.options import PATH

if TYPE_CHECKING:
    from edgelm.generation.language_model import LanguageModel

prompt_cache_option = option(
    "--prompt-cache",
    metavar="FILE",
    type=PATH,
    help="Keep the computed prompt in FILE: a later run whose prompt begins alike computes only the rest. FILE belongs "
    "to the bundle, the runtime and the type of the KV cache.",
)


class PromptCache:
    """The file of --prompt-cache.

    Args:
        path: the file, which need not exist.
        bundle: the bundle's folder, which the file must not lie in.
        everything: save the generated tokens as well, not only the prompt.
        quiet: do not say what was loaded and saved.

    Raises:
        EdgeLMError: no session can be written to `path`.
    """

    def __init__(self, path: Path, bundle: Path, *, everything: bool, quiet: bool) -> None:
        from edgelm.generation.session_file import SESSION
        from edgelm.output_paths import check_output

        check_output(path, SESSION, sources=[bundle], overwrite=True)
        self._path, self._everything, self._quiet = path, everything, quiet
        self._tokens: list[int] = []
        self._fresh = False

    def load(self, model: LanguageModel) -> None:
        """Load the file into the model if it exists.

        Raises:
            EdgeLMError: the runtime has no such files, or the file cannot be used; says what to do.
        """
        from edgelm.errors import ContextLengthError, SessionError
        from edgelm.generation.session_file import require_savable

        require_savable(model.runtime)
        if not self._path.exists():
            return
        started = time.perf_counter()
        try:
            count = model.load_session(self._path)
        except (SessionError, ContextLengthError) as error:
            raise type(error)(f"{error}; or give another file to --prompt-cache, or delete this one") from error
        prompt = model.cache.last_prompt
        self._say(f"{count:,} tokens loaded from {self._path} in {time.perf_counter() - started:.2f} s")
        self._tokens, self._fresh = model.cache.cached, prompt is not None and prompt.fresh

    def save(self, model: LanguageModel) -> None:
        """Save the prompt that the model computed last, if the file does not have it.

        Raises:
            EdgeLMError: the file cannot be written; an earlier one is unchanged.
        """
        from edgelm.sizes import format_size

        prompt, cached = model.cache.last_prompt, model.cache.cached
        if prompt is None:  # interrupted while it was computed
            return
        count = len(cached) if self._everything else len(prompt.tokens)
        known = cached[:count] == self._tokens[:count]
        # With --seed, a prompt is computed again if what the file has depends on earlier runs: that is worth saving.
        if known and (count < len(self._tokens) or self._fresh or not prompt.fresh):
            return
        started = time.perf_counter()
        model.save_session(self._path, tokens=count)
        seconds, size = time.perf_counter() - started, format_size(self._path.stat().st_size)
        self._say(f"{count:,} tokens saved in {self._path}: {size} in {seconds:.2f} s")

    def explain_seed(self, model: LanguageModel, reused: int) -> None:
        """Say why a run with --seed reused only `reused` tokens, if the file has more of the prompt."""
        prompt = model.cache.last_prompt
        if prompt is None:
            return
        pairs = enumerate(zip(self._tokens, prompt.tokens, strict=False))
        common = next((i for i, (a, b) in pairs if a != b), min(len(self._tokens), len(prompt.tokens)))
        if reused < min(common, len(prompt.tokens) - 1):
            self._say(
                f"--seed: of {common:,} tokens in {self._path}, {reused:,} were reused: only whole steps of "
                f"{model.runtime.chunk} tokens give the same text as without the file"
            )

    def _say(self, text: str) -> None:
        if not self._quiet:
            click.echo(f"[{text}]", err=True)
