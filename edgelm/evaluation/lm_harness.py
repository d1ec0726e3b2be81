"""Model class "edgelm" for EleutherAI's lm-evaluation-harness, which runs a bundle.

    edgelm harness --model edgelm --model_args bundle=DIR --tasks arc_challenge --num_fewshot 25

It uses the bundle's own runtime, tokenizer and chat template, one sequence at a time. Texts are split into context and
continuation, truncated and summed as in the harness's Hugging Face model; methods that differ say so. Requests are
sorted by their tokens, so that a shared prefix (few-shot examples, the question of a multiple choice) is computed once.

Needs lm_eval, but no torch. Importing this module registers the model, since the harness has no plugin mechanism.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from edgelm.errors import EdgeLMError, GenerationError
from edgelm.generation.language_model import load
from edgelm.generation.sampling import Sampling
from edgelm.parity.logits import logsumexp
from edgelm.tokenization.chat_template import ChatTemplate
from edgelm.version import __version__

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

log = logging.getLogger(__name__)

NAME = "edgelm"
DEFAULT_MAX_TOKENS = 256
"""Tokens to generate where a task does not say: the harness's default."""

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING = tuple(field.name for field in fields(Sampling))


@dataclass(frozen=True)
class _Scored:
    """A request to score: the model's input tokens, and the target tokens whose log-probabilities are summed.

    `index`: of the request. `inputs` [n] and `targets` [c], c <= n: target i follows input n - c + i.
    """

    index: int
    inputs: tuple[int, ...]
    targets: tuple[int, ...]


@register_model(NAME)
class EdgeLM(TemplateLM):  # type: ignore[misc]  # lm_eval has no types
    """A loaded bundle as a model of the harness.

    Args:
        bundle: the bundle's folder.
        runtime, threads, context_length, kv: as for `edgelm.load`.
        batch_size, max_batch_size, device: passed on by the harness's command line and ignored, but a batch above 1 is
            an error. Sequences run one at a time, on the device that the bundle was exported for.

    Raises:
        EdgeLMError: the bundle cannot be loaded, a setting is unknown, or `batch_size` is above 1.
    """

    def __init__(
        self,
        bundle: str | None = None,
        runtime: str | None = None,
        threads: int | None = None,
        context_length: int | None = None,
        kv: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown or bundle is None:
            wrong = f"{', '.join(unknown)} is no setting of this model" if unknown else "which bundle is not said"
            raise EdgeLMError(
                f"{wrong}: write --model_args bundle=DIR and, if wanted, runtime=, threads=, context_length=, kv="
            )
        # "auto" means the largest possible batch, which is 1.
        if str(batch_size) not in ("None", "1") and not str(batch_size).startswith("auto"):
            raise EdgeLMError(f"batch_size is {batch_size}: bundles run one sequence at a time, leave it out")
        # The command line passes a GPU as the default device; a bundle has its own target.
        del max_batch_size, device
        self._model = load(bundle, runtime=runtime, threads=threads, context_length=context_length, kv=kv, chat=False)
        self._tokens = self._model.tokenizer
        self._template: ChatTemplate | None = None

    def close(self) -> None:
        """Free the model's memory."""
        self._model.close()

    @property
    def max_length(self) -> int:
        """The context length in tokens."""
        return self._model.runtime.context_length

    @property
    def max_gen_toks(self) -> int:
        """Tokens to generate where a task does not say."""
        return DEFAULT_MAX_TOKENS

    @property
    def eot_token_id(self) -> int:
        """The end-of-sequence token."""
        return self._model.bundle.manifest.tokens.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context: bos, or eos where the model has no bos.

        The same as in the harness's Hugging Face model.
        """
        begin = self._tokens.bos_id
        return self.eot_token_id if begin is None else begin

    @cached_property
    def tokenizer_name(self) -> str:
        """A name that identifies the bundle's tokenizer; the harness uses it as a key of its prompt cache."""
        return f"{NAME}-{self._tokens.fingerprint()[:16]}"

    def get_model_info(self) -> dict[str, Any]:
        """Return information on the model, which the harness writes with the results."""
        manifest, runtime = self._model.bundle.manifest, self._model.runtime
        return {
            "model_name": manifest.model.name,
            "edgelm_version": __version__,
            "edgelm_recipe": manifest.recipe.name,
            "edgelm_ops": manifest.ops,
            "edgelm_runtime": runtime.name,
            "edgelm_context_length": runtime.context_length,
        }

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the token ids of a text.

        Args:
            string: the text.
            add_special_tokens: whether to prepend bos, where the model has one. None: the tokenizer's default, unless
                the text begins with bos already, as the output of a chat template does.
        """
        begin = None if self._tokens.bos_id is None else self._tokens.token(self._tokens.bos_id)
        if begin is None or (add_special_tokens is None and string.startswith(begin)):
            return self._tokens.encode(string, add_bos=False)
        return self._tokens.encode(string, add_bos=add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a conversation with the bundle's chat template.

        Args:
            chat_history: messages with "role" and "content".
            add_generation_prompt: end with the prompt for the model's answer. False: the last message is the beginning
                of the answer, and the text ends with its content.

        Raises:
            EdgeLMError: the bundle has no template, or the template refuses the messages, even without a system
                message.
        """
        template = self._template or ChatTemplate.from_folder(self._model.bundle.path, self._tokens)
        try:
            text = template.render(chat_history, add_generation_prompt)
        except GenerationError as error:
            rest = [message for message in chat_history if message["role"] != "system"]
            if len(rest) == len(chat_history):
                raise
            log.warning("%s: rendered again without the system message", error)
            text = template.render(rest, add_generation_prompt)
        return text if add_generation_prompt else _without_ending(text, chat_history[-1]["content"])

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Select the chat template for `apply_chat_template`: True for the default one, or a template's name.

        Returns:
            The source of the template; None for False.
        """
        if chat_template is False or chat_template is None:
            return None
        name = chat_template if isinstance(chat_template, str) else None
        self._template = ChatTemplate.from_folder(self._model.bundle.path, self._tokens, name)
        return self._template.source

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole texts, in the harness's windows.

        Only `prefix_token_id` comes before a text. The harness's Hugging Face model differs: its tokenizer may add bos
        after it, whose log-likelihood is then counted.
        """
        windows: list[tuple[Any, list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                context, continuation = make_disjoint_window(window)
                windows.append((None, context, continuation))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Score each (key, context, continuation).

        A context that is too long is truncated at its beginning.

        Returns:
            For each, the sum of the continuation's log-probabilities in nats, and whether every token of it was the
            most likely one.

        Raises:
            EdgeLMError: a context or continuation is empty, or a continuation is longer than the model's context.
        """
        self._model.runtime.reset()
        scored = sorted(self._cut(requests), key=lambda item: item.inputs)
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Scoring") as bar:
            for inputs, group in groupby(scored, key=lambda item: item.inputs):
                members = list(group)
                for member, result in zip(members, self._score(inputs, members), strict=True):
                    results[member.index] = result
                    key = requests[member.index][0]
                    if key is not None:
                        self.cache_hook.add_partial("loglikelihood", key, result)
                bar.update(len(members))
        return results

    def _cut(self, requests: Sequence[tuple[Any, list[int], list[int]]]) -> Iterator[_Scored]:
        for index, (_, context, continuation) in enumerate(requests):
            if not context or not continuation:
                raise EdgeLMError(f"request {index} has an empty context or continuation: it has no log-likelihood")
            if len(continuation) > self.max_length:
                raise EdgeLMError(
                    f"a continuation of {len(continuation)} tokens does not fit into the window of {self.max_length}: "
                    "load the bundle with a larger context_length"
                )
            tokens = [*context, *continuation][-(self.max_length + 1) :]
            yield _Scored(index, tuple(tokens[:-1]), tuple(continuation))

    def _score(self, inputs: tuple[int, ...], members: Sequence[_Scored]) -> list[tuple[float, bool]]:
        """Score requests that have the same input tokens."""
        # At least two rows: for a single one the head may compute only the most likely tokens exactly.
        rows = min(len(inputs), max(2, *(len(member.targets) for member in members)))
        sums, greedy = [0.0] * len(members), [True] * len(members)
        position = len(inputs) - rows
        for block in self._model.cache.logits_of_last(inputs, rows):
            for row in block:
                normaliser, best = float(logsumexp(row)), int(row.argmax())
                for number, member in enumerate(members):
                    place = position - len(inputs) + len(member.targets)
                    if place >= 0:
                        target = member.targets[place]
                        sums[number] += float(row[target]) - normaliser
                        greedy[number] &= best == target
                position += 1
        return list(zip(sums, greedy, strict=True))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate a continuation of each context, greedily unless its settings ask for sampling.

        Settings: `until` (one or more stop strings, which the answer does not include), `max_gen_toks` and its other
        names, `do_sample`, and the fields of `edgelm.generation.sampling.Sampling`. A context that leaves no room for
        the tokens to generate is truncated at its beginning.

        Raises:
            EdgeLMError: a setting is unknown, or the tokens to generate alone do not fit.
        """
        self._model.runtime.reset()
        prepared = []
        for index, request in enumerate(requests):
            context, settings = request.args
            options = generation_options(settings)
            room = self.max_length - options["max_tokens"]
            if room < 1:
                raise EdgeLMError(
                    f"{options['max_tokens']} tokens to generate leave no room for a prompt in the window of "
                    f"{self.max_length}: load with a larger context_length, or lower max_gen_toks (--gen_kwargs)"
                )
            prepared.append((self.tok_encode(context)[-room:], index, options))
        answers = [""] * len(requests)
        # In sorted order neighbours share prefixes, which stay in the KV cache.
        for tokens, index, options in tqdm(
            sorted(prepared, key=lambda item: item[:2]), disable=disable_tqdm, desc="Generating"
        ):
            answers[index] = self._model.generate(tokens, **options).text
            self.cache_hook.add_partial("generate_until", requests[index].args, answers[index])
        return answers


def generation_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a task's `generation_kwargs` to options of `LanguageModel.generate`.

    With `do_sample` the default `temperature` is 1; `do_sample=False` means greedy decoding. Without `do_sample`,
    sampling is on where `temperature` is above 0.

    Raises:
        EdgeLMError: a setting is unknown.
    """
    left = dict(settings)
    until = left.pop("until", None) or []
    lengths = [left.pop(name, None) for name in _LENGTHS]
    given = [int(length) for length in lengths if length is not None]
    do_sample = left.pop("do_sample", None)
    temperature = float(left.pop("temperature", 1.0 if do_sample else 0.0))
    if do_sample is False:
        temperature = 0.0
    unknown = sorted(set(left) - set(_SAMPLING))
    if unknown:
        known = ", ".join(sorted({"until", "do_sample", *_LENGTHS, *_SAMPLING}))
        raise EdgeLMError(f"generation setting {', '.join(unknown)} is unknown; there are: {known}")
    if temperature == 0:
        # Tasks set these for other models; in greedy decoding they have no effect.
        left = {name: value for name, value in left.items() if name not in ("top_k", "top_p", "min_p")}
    return {
        "stop": [until] if isinstance(until, str) else [text for text in until if text],
        "max_tokens": given[0] if given else DEFAULT_MAX_TOKENS,
        "temperature": temperature,
        **left,
    }


def _without_ending(text: str, content: str) -> str:
    """Return a rendered conversation up to the end of the last message's content. Templates may strip the content."""
    stripped = content.strip()
    begin = text.rfind(stripped)
    if begin < 0:
        raise GenerationError("the chat template leaves the last message out: there is no answer to go on with")
    kept = content.lstrip()
    return text[: begin + len(kept if text.startswith(kept, begin) else stripped)]


def main(arguments: Sequence[str]) -> None:
    """Run the harness's command line with these arguments; "edgelm" is one of its models."""
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["edgelm harness", *arguments]
    cli_evaluate()
