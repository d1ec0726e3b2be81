"""`POST /v1/completions`."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING, Any

from edgelm.serving.api.answers import CompletionAnswer, CompletionChoice, Usage, as_json
from edgelm.serving.api.errors import ApiError, invalid
from edgelm.serving.api.requests import CompletionRequest
from edgelm.serving.endpoints.chat import reason_of
from edgelm.serving.engine import Finished, Token
from edgelm.serving.events import DONE, PING, EventStream, error_event, event
from edgelm.serving.generating import (
    Order,
    Run,
    allowed_tokens,
    answered,
    grammar_of,
    options_of,
    orders_of,
    require_prompt,
)
from edgelm.serving.token_texts import completion_logprobs

if TYPE_CHECKING:
    from edgelm.serving.guard import Client
    from edgelm.serving.models import ServedModel
    from edgelm.serving.service import Service

MAX_PROMPTS = 256
MAX_SEQUENCES = 1024


def inputs(given: str | list[str] | list[int] | list[list[int]], param: str) -> list[str | list[int]]:
    """Return the texts or lists of ids of a field that may have one or many.

    Raises:
        ApiError: there is none, or too many.
    """
    if isinstance(given, str):
        return [given]
    found: list[Any] = [given] if given and isinstance(given[0], int) else list(given)
    if not 1 <= len(found) <= MAX_PROMPTS:
        raise invalid(param, f"{param} has {len(found)} entries: give 1 to {MAX_PROMPTS}")
    return found


def ids_of(given: str | list[int], model: ServedModel, param: str) -> list[int]:
    """Return the tokens of a text, or tokens that are in the vocabulary.

    Raises:
        ApiError: a token is not in the vocabulary.
    """
    language_model = model.running.model
    if isinstance(given, str):
        return language_model.tokenizer.encode(given)
    wrong = next((token for token in given if token >= language_model.runtime.vocab_size), None)
    if wrong is not None:
        most = language_model.runtime.vocab_size - 1
        raise invalid(param, f"{param} has the token {wrong}: ids go from 0 to {most}")
    return given


class Completion:
    """A completion that is prepared, and then answered as a whole or as a stream.

    Args:
        service: the server.
        request: what is asked for.
        client: who asks.
        model: the model, in use until the end.
    """

    def __init__(self, service: Service, request: CompletionRequest, client: Client, model: ServedModel) -> None:
        self._service, self._request, self._client, self._model = service, request, client, model
        self._id, self._created = f"cmpl-{secrets.token_hex(12)}", int(time.time())
        self._tokenizer = model.running.model.tokenizer
        self._end_ids = model.running.model.end_ids
        self._n = request.n or 1
        self._tried = max(self._n, request.best_of or 1)

    def prepare(self) -> None:
        """Check the request and tokenize its prompts; in a thread.

        Raises:
            ApiError: a field is wrong.
        """
        request = self._request
        if request.best_of is not None and request.best_of < self._n:
            raise invalid("best_of", f"best_of is {request.best_of}, less than n, {self._n}")
        if request.stream and self._tried > self._n:
            raise invalid("best_of", "best_of needs all answers before it can choose: leave stream out")
        if request.echo and request.logprobs is not None:
            raise invalid(
                "echo", "echo with logprobs is not supported: the prompt's log-probabilities are not computed"
            )
        limit = allowed_tokens(request.max_tokens, self._service, "max_tokens")
        stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
        options = options_of(request, self._model, limit, stop=stop)
        self._prompts = [ids_of(one, self._model, "prompt") for one in inputs(request.prompt, "prompt")]
        if len(self._prompts) * self._tried > MAX_SEQUENCES:
            raise invalid("prompt", f"prompts times answers are more than {MAX_SEQUENCES}: send several requests")
        grammar = grammar_of(request, self._model)
        self._orders: list[Order] = []
        for prompt in self._prompts:
            require_prompt(len(prompt), self._model, self._service, "prompt")
            self._orders += orders_of(request, prompt, options, self._model, self._tried, grammar)
        self._echoes = [self._tokenizer.decode(one) if request.echo else "" for one in self._prompts]

    def start(self, deadline: float) -> Run:
        """Hand the sequences to the engine. Raises as `Run.start`."""
        logprobs = self._request.logprobs
        if logprobs is None and self._tried > self._n:
            logprobs = 0
        run = Run(self._service, self._model, self._orders, self._client, logprobs=logprobs, deadline=deadline)
        run.start()
        return run

    async def whole(self, run: Run) -> CompletionAnswer:
        """Return the answer when it is complete. Raises as `Run.events`."""
        tokens: list[list[Token]] = [[] for _ in self._orders]
        async for found in run.events():
            for index, item in found:
                if isinstance(item, Token) and item.token not in self._end_ids:
                    tokens[index].append(item)
        choices: list[CompletionChoice] = []
        for place in range(len(self._prompts)):
            tried = range(place * self._tried, (place + 1) * self._tried)
            for index in self._best(tried, tokens):
                generation = run.generations[index]
                assert generation is not None
                logprobs = None
                if self._request.logprobs is not None:
                    logprobs = completion_logprobs(self._tokenizer, tokens[index], 0)
                text = self._echoes[place] + generation.text
                choices.append(CompletionChoice(len(choices), text, reason_of(generation), logprobs))
        return CompletionAnswer(
            self._id, "text_completion", self._created, self._model.name, choices, self._usage(run),
            self._model.fingerprint,
        )  # fmt: skip

    def _best(self, tried: Sequence[int], tokens: Sequence[Sequence[Token]]) -> list[int]:
        """Return the `n` sequences with the highest mean log-probability, best first; all in their order without
        `best_of`."""
        if self._tried == self._n:
            return list(tried)

        def mean(index: int) -> float:
            own = [token.logprob or 0.0 for token in tokens[index]]
            return sum(own) / len(own) if own else 0.0

        return sorted(tried, key=mean, reverse=True)[: self._n]

    def _usage(self, run: Run) -> Usage:
        return run.usage(sum(map(len, self._prompts)))

    async def stream(self, run: Run) -> AsyncGenerator[bytes, None]:
        """Yield the events of the answer."""
        lengths = [0] * len(self._orders)
        options = self._request.stream_options
        with_usage = options is not None and bool(options.include_usage)
        more: dict[str, Any] = {"usage": None} if with_usage else {}
        try:
            for index in range(len(self._orders)):
                if self._request.echo:
                    yield self._chunk(index, self._echoes[index // self._n], None, None, more)
            async for found in run.events():
                yield b"".join(self._chunks(found, lengths, more)) if found else PING
            if with_usage:
                yield event({**self._head(), "choices": [], "usage": json.loads(as_json(self._usage(run)))})
        except ApiError as error:
            yield error_event(error)
        yield DONE

    def _chunks(
        self, found: list[tuple[int, Token | Finished]], lengths: list[int], more: dict[str, Any]
    ) -> list[bytes]:
        chunks = []
        for index, item in found:
            if isinstance(item, Finished):
                chunks.append(self._chunk(index, "", reason_of(item.generation), None, more))
                continue
            logprobs = None
            if self._request.logprobs is not None and item.token not in self._end_ids:
                logprobs = json.loads(as_json(completion_logprobs(self._tokenizer, [item], lengths[index])))
            lengths[index] += len(item.text)
            if item.text or logprobs:
                chunks.append(self._chunk(index, item.text, None, logprobs, more))
        return chunks

    def _head(self) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._model.name,
            "system_fingerprint": self._model.fingerprint,
        }

    def _chunk(self, index: int, text: str, reason: str | None, logprobs: Any, more: dict[str, Any]) -> bytes:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return event({**self._head(), "choices": [choice], **more})


async def create(service: Service, request: CompletionRequest, client: Client) -> CompletionAnswer | EventStream:
    """Continue prompts."""
    return await answered(service, request, client, lambda model: Completion(service, request, client, model))
