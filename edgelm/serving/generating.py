"""One request's generations: what is asked of the engine, and its events as they arrive."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from edgelm.errors import EdgeLMError, GenerationError, QueueFullError, TimeLimitError
from edgelm.generation.options import Options
from edgelm.serving.api.answers import CachedTokens, Usage
from edgelm.serving.api.errors import ApiError, invalid, is_of_request, of_request
from edgelm.serving.api.requests import Completing, Generating
from edgelm.serving.engine import Event, Failed, Finished, Job, Token
from edgelm.serving.events import PING_SECONDS, EventStream, Inbox
from edgelm.serving.logit_rules import Bias, NoEnd, Penalties
from edgelm.serving.models import ServedModel

if TYPE_CHECKING:
    from edgelm.generation.scheduler import LogitsRule
    from edgelm.generation.stream import Generation
    from edgelm.serving.api.responses import ResponsesRequest
    from edgelm.serving.constraints import Grammar, Reasoning
    from edgelm.serving.conversation import Tooling
    from edgelm.serving.guard import Client
    from edgelm.serving.service import Service

A = TypeVar("A", covariant=True)

SMALLEST_TOP_P = 1e-6
"""In place of top_p = 0, which leaves the most likely token alone."""


@dataclass(frozen=True)
class Order:
    """One sequence to generate.

    Attributes:
        prompt: the prompt's ids.
        options: how tokens are chosen and when the text ends.
        rules: makes the rules for the logits.
    """

    prompt: list[int]
    options: Options
    rules: Callable[[], list[LogitsRule]] = list


def options_of(
    request: Generating, model: ServedModel, max_tokens: int | None, *, stop: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the options of generation, as `Options.of` takes them: of the request, else of the bundle, else OpenAI's.

    Raises:
        ApiError: more tokens are asked for than this server allows.
    """
    chosen: dict[str, Any] = {"temperature": 1.0, **model.defaults}
    given = {name: getattr(request, name) for name in ("temperature", "top_p", "top_k", "min_p")}
    chosen |= {name: value for name, value in given.items() if value is not None}
    if chosen["temperature"] == 0:
        # They change nothing: the most likely token passes every filter.
        chosen = {name: value for name, value in chosen.items() if name not in ("top_p", "top_k", "min_p")}
    if "top_k" in chosen:
        chosen["top_k"] = max(0, chosen["top_k"])
    if "top_p" in chosen:
        chosen["top_p"] = max(SMALLEST_TOP_P, chosen["top_p"])
    if request.seed is not None:
        chosen["seed"] = request.seed % 2**64
    return {**chosen, "max_tokens": max_tokens, "stop": tuple(stop)}


def allowed_tokens(wanted: int | None, service: Service, param: str) -> int | None:
    """Return the most tokens of an answer; None: until the context is full.

    Raises:
        ApiError: more are asked for than this server allows.
    """
    limit = service.settings.limits.max_tokens
    if wanted is not None and limit is not None and wanted > limit:
        raise invalid(param, f"{param} is {wanted}, and this server allows {limit} at most")
    return limit if wanted is None else wanted


def require_prompt(tokens: int, model: ServedModel, service: Service, param: str) -> None:
    """Check the length of a prompt.

    Raises:
        ApiError: it is empty, or longer than the context or the server's limit.
    """
    limit = service.settings.limits.prompt_tokens
    if not tokens:
        raise invalid(param, f"{param} has no tokens: give some text")
    if limit is not None and tokens > limit:
        raise invalid(
            param, f"the prompt has {tokens} tokens, and this server allows {limit} at most",
            code="context_length_exceeded",
        )  # fmt: skip
    if tokens > model.context_length:
        raise invalid(
            param, f"the prompt has {tokens} tokens, and the context of {model.name} is {model.context_length} here",
            code="context_length_exceeded",
        )  # fmt: skip


def form_of(request: Completing) -> tuple[str, dict[str, Any]] | None:
    """Return the field that says what answers look like, and its value as `grammar_for` takes it; None for any text.

    Raises:
        ApiError: there are two, or a schema is missing.
    """
    named = [name for name in ("response_format", "regex", "grammar") if getattr(request, name) is not None]
    if not named:
        return None
    if len(named) > 1:
        raise invalid(named[1], f"{' and '.join(named)} both say what the answer looks like: give one")
    if request.response_format is None:
        return named[0], {"type": named[0], named[0]: getattr(request, named[0])}
    kind, schema = request.response_format.type, request.response_format.json_schema
    if (schema is not None) != (kind == "json_schema"):
        where = "response_format.json_schema"
        raise invalid(where, f'{where} goes with the type "json_schema" alone')
    if kind == "text":
        return None
    wanted: dict[str, Any] = {"type": kind}
    if schema is not None:
        wanted["json_schema"] = {"name": schema.name, "schema": schema.schema or {}}
    return "response_format", wanted


def grammar_of(request: Completing, model: ServedModel, tools: Tooling | None = None) -> Grammar | None:
    """Return the grammar that the answers have to match; None for any text.

    Raises:
        ApiError: it is wrong or cannot be enforced.
    """
    from edgelm.serving.constraints import grammar_for

    form = form_of(request)
    name, wanted = form or ("response_format", None)
    try:
        if tools is not None:
            return tools.format.grammar(tools.options, model.grammar_tokenizer(), wanted)
        return None if form is None else grammar_for(wanted, model.grammar_tokenizer(), name)
    except GenerationError as error:
        raise of_request(error, model.hidden, None if tools is not None else name) from error


def orders_of(
    request: Completing,
    prompt: list[int],
    options: dict[str, Any],
    model: ServedModel,
    choices: int,
    grammar: Grammar | None,
    reasoning: Reasoning | None = None,
) -> list[Order]:
    """Return the sequences of the choices of one prompt: seeds that differ, and rules of their own.

    Args:
        request: what is asked for.
        prompt: the prompt's ids.
        options: of `options_of`.
        model: the model.
        choices: number of sequences.
        grammar: what the answers match; None: any text.
        reasoning: what comes before that; None: nothing.

    Raises:
        ApiError: a token of logit_bias is not in the vocabulary.
    """
    end_ids, vocab_size = model.running.model.end_ids, model.running.model.runtime.vocab_size
    options = dict(options)
    if request.repetition_penalty is not None:
        options["repetition_penalty"] = request.repetition_penalty
    biases = {}
    for key, value in (request.logit_bias or {}).items():
        if not key.isascii() or not key.isdigit() or len(key) > 10 or int(key) >= vocab_size:
            raise invalid("logit_bias", f"logit_bias has the token {key!r:.60}: ids go from 0 to {vocab_size - 1}")
        biases[int(key)] = value
    frequency, presence = request.frequency_penalty or 0.0, request.presence_penalty or 0.0

    def rules() -> list[LogitsRule]:
        found: list[LogitsRule] = []
        if biases:
            found.append(Bias(biases))
        if frequency or presence:
            found.append(Penalties(frequency, presence))
        if request.ignore_eos or request.min_tokens:
            found.append(NoEnd(end_ids, None if request.ignore_eos else request.min_tokens))
        if grammar is not None:
            # The last one: what it forbids stays forbidden.
            rule = grammar.rule()
            found.append(rule if reasoning is None else reasoning.grammar_rule(rule, model.running.model.tokenizer))
        return found

    seed = options.get("seed")
    orders = []
    for number in range(choices):
        own = options if seed is None else {**options, "seed": (seed + number) % 2**64}
        orders.append(Order(prompt, Options.of(own), rules))
    return orders


class Run:
    """Sequences of one request that the engine generates.

    Args:
        service: the server.
        model: the model, in use until the run has ended.
        orders: the sequences.
        client: who asked.
        logprobs: alternatives of each token; None: no log-probabilities.
        deadline: when it fails, as `time.monotonic`.
        shown: special tokens that are part of the text.

    Attributes:
        generations: the result of each sequence; None while it has none.
    """

    def __init__(
        self,
        service: Service,
        model: ServedModel,
        orders: Sequence[Order],
        client: Client,
        *,
        logprobs: int | None,
        deadline: float,
        shown: frozenset[int] = frozenset(),
    ) -> None:
        self._service, self._model, self._engine = service, model, model.running
        self._inbox: Inbox[tuple[int, Event] | ApiError] = Inbox()
        self._started = time.monotonic()
        self.generations: list[Generation | None] = [None] * len(orders)
        self._jobs: list[Job] = []
        self._submitted = 0
        for index, order in enumerate(orders):
            answer = self._engine.model.continuation(order.prompt, order.options, shown=shown)
            self._jobs.append(
                Job(
                    answer, self._notifier(index), rules=order.rules(), logprobs=logprobs, client=client.name,
                    deadline=deadline,
                )
            )  # fmt: skip

    def _notifier(self, index: int) -> Callable[[Event], None]:
        """Return what the engine calls, in its thread, with the events of a sequence."""
        metrics, name, inbox = self._service.metrics, self._model.name, self._inbox
        first, between = metrics.first_token(name), metrics.between_tokens(name)
        before: float | None = None

        def notify(event: Event) -> None:
            nonlocal before
            if isinstance(event, Token):
                now = time.monotonic()
                if before is None:
                    first.observe(now - self._started)
                else:
                    between.observe(now - before)
                before = now
            inbox.put((index, event))

        return notify

    def start(self) -> None:
        """Hand the sequences to the engine.

        Raises:
            ApiError: too many sequences wait.
        """
        self._service.runs.add(self)
        try:
            for job in self._jobs:
                self._engine.submit(job)
                self._submitted += 1
        except EdgeLMError as error:
            self.cancel()
            raise self._answer(error) from error

    async def events(self) -> AsyncIterator[list[tuple[int, Token | Finished]]]:
        """Yield events with the number of their sequence; an empty list after some time without any.

        Raises:
            ApiError: a sequence failed, or the server is being stopped.
        """
        while any(generation is None for generation in self.generations):
            found: list[tuple[int, Token | Finished]] = []
            for item in await self._inbox.take(PING_SECONDS):
                if isinstance(item, ApiError):
                    raise item
                index, event = item
                if isinstance(event, Failed):
                    self._service.metrics.finished(self._model.name, "error")
                    raise self._answer(event.error) from event.error
                if isinstance(event, Finished):
                    self.generations[index] = event.generation
                    self._service.metrics.finished(self._model.name, event.generation.stop_reason)
                    self._service.metrics.whole(self._model.name).observe(time.monotonic() - self._started)
                found.append((index, event))
            yield found

    async def finish(self) -> None:
        """Wait for the end of all sequences. Raises as `events`."""
        async for _ in self.events():
            pass

    def fail(self, error: ApiError) -> None:
        """End the run with an error."""
        self._inbox.put(error)

    def cancel(self) -> None:
        """End what runs still; called at the end in any case."""
        self._service.runs.discard(self)
        for index, job in enumerate(self._jobs[: self._submitted]):
            if self.generations[index] is None:
                self._engine.cancel(job)

    def usage(self, prompt_tokens: int) -> Usage:
        """Return the token counts.

        Args:
            prompt_tokens: tokens of the request's prompts, each counted once.
        """
        done = [generation for generation in self.generations if generation is not None]
        completion = sum(len(generation.tokens) for generation in done)
        # Choices of one prompt share it: what the first one of each had to compute counts.
        reused = min((generation.timings.reused_tokens for generation in done), default=0)
        return Usage(prompt_tokens, completion, prompt_tokens + completion, CachedTokens(reused))

    def _answer(self, error: EdgeLMError) -> ApiError:
        if isinstance(error, QueueFullError):
            return ApiError(429, str(error), code="queue_full", headers={"Retry-After": "1"})
        if isinstance(error, TimeLimitError):
            return ApiError(504, str(error), code="timeout")
        if is_of_request(error):
            return of_request(error, self._model.hidden)
        return ApiError(500, f"{self._model.name} failed; the server's log has the reason")


class Generated(Protocol[A]):
    """A request that generates text, of which the answer is a dataclass `A` or a stream."""

    def prepare(self) -> None:
        """Check the request and make its prompts; called in a thread, since that takes time.

        Raises:
            ApiError, EdgeLMError: the request is wrong.
        """

    def start(self, deadline: float) -> Run:
        """Hand the sequences to the engine. Raises as `Run.start`."""

    async def whole(self, run: Run) -> A:
        """Return the answer when it is complete. Raises as `Run.events`."""

    def stream(self, run: Run) -> AsyncGenerator[bytes, None]:
        """Yield the events of the answer."""


async def answered(
    service: Service,
    request: Completing | ResponsesRequest,
    client: Client,
    make: Callable[[ServedModel], Generated[A]],
) -> A | EventStream:
    """Generate an answer, as a whole or as a stream, as the request says.

    Args:
        service: the server.
        request: what is asked for.
        client: who asks.
        make: called with the model once it is loaded.

    Raises:
        ApiError: the request is wrong, too many run, or the generation fails.
    """
    if request.stream_options is not None and not request.stream:
        raise invalid("stream_options", "stream_options needs stream: true")
    deadline = service.deadline()
    async with AsyncExitStack() as stack:
        stack.enter_context(service.admitted(client))
        model = await stack.enter_async_context(service.models.use(request.model, deadline - time.monotonic()))
        generated = make(model)
        try:
            await asyncio.to_thread(generated.prepare)
        except EdgeLMError as error:
            if not is_of_request(error):
                raise
            raise of_request(error, model.hidden) from error
        run = generated.start(deadline)
        stack.callback(run.cancel)
        if not request.stream:
            return await generated.whole(run)
        return EventStream(generated.stream(run), stack.pop_all(), service.settings.limits.send_seconds)
    raise AssertionError("an exit stack suppresses nothing")
