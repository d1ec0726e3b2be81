"""Endpoints about the server and its models: the list, loading and unloading, health, metrics, tokens."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from starlette.responses import Response

from edgelm.errors import EdgeLMError
from edgelm.serving.api.answers import DetokenizeAnswer, Health, ModelEntry, ModelList, TokenizeAnswer
from edgelm.serving.api.errors import invalid, is_of_request, of_request
from edgelm.serving.api.requests import DetokenizeRequest, ModelRequest, TokenizeRequest
from edgelm.serving.conversation import conversation_tokens, tooling
from edgelm.serving.endpoints.completions import ids_of
from edgelm.serving.models import LOADED
from edgelm.serving.token_texts import text_and_bytes

if TYPE_CHECKING:
    from edgelm.serving.guard import Client
    from edgelm.serving.models import ServedModel
    from edgelm.serving.service import Service


async def models(service: Service, client: Client) -> ModelList:
    """List the models."""
    del client
    entries = await asyncio.to_thread(lambda: [model.entry() for model in service.models.all.values()])
    return ModelList("list", entries)


async def load(service: Service, request: ModelRequest, client: Client) -> ModelEntry:
    """Load a model, and wait until it is loaded."""
    with service.admitted(client):
        model = service.models.find(request.model)
        await service.models.load(model)
        return await asyncio.to_thread(model.entry)


async def unload(service: Service, request: ModelRequest, client: Client) -> ModelEntry:
    """Unload a model that no request uses.

    The next request for it loads it again.
    """
    with service.admitted(client):
        model = service.models.find(request.model)
        await service.models.unload(model)
        return await asyncio.to_thread(model.entry)


async def health(service: Service, client: Client) -> Health:
    """Say whether the server takes requests."""
    del client
    states = {name: model.state for name, model in service.models.all.items()}
    return Health("closing" if service.closing else "ok", states)


async def metrics(service: Service, client: Client) -> Response:
    """Return the figures of the server in the text format of Prometheus."""
    del client
    engines: dict[str, dict[str, float]] = {}
    for name, model in service.models.all.items():
        engine = model.engine
        if engine is not None:
            found = engine.statistics()
            engines[name] = {
                "sequences_waiting": found.waiting,
                "sequences_running": found.running,
                "slots": engine.slots,
                "prompt_tokens_total": found.prompt_tokens,
                "reused_tokens_total": found.reused_tokens,
                "generated_tokens_total": found.generated_tokens,
                "steps_total": found.steps,
                "busy_seconds_total": found.busy_seconds,
                "prefix_cache_bytes": found.prefix_bytes,
            }
    loaded = sum(model.state == LOADED for model in service.models.all.values())
    text = service.metrics.text(engines, {"requests_active": service.active, "models_loaded": loaded})
    return Response(text, media_type="text/plain; version=0.0.4")


async def tokenize(service: Service, request: TokenizeRequest, client: Client) -> TokenizeAnswer:
    """Return the tokens of a text or of a conversation."""
    if (request.prompt is None) == (request.messages is None):
        raise invalid("prompt", "give either prompt or messages")
    if request.messages is None and (request.tools or request.chat_template_kwargs):
        raise invalid("tools", "tools and chat_template_kwargs are for messages: a prompt has no template")
    if request.messages is not None and request.add_special_tokens is not None:
        raise invalid(
            "add_special_tokens", "add_special_tokens is for a prompt: a template writes special tokens itself"
        )

    def tokens(model: ServedModel) -> TokenizeAnswer:
        tokenizer = model.running.model.tokenizer
        if request.messages is not None:
            found = conversation_tokens(
                model, request.messages, tooling(model, request.tools), request.chat_template_kwargs
            )
        else:
            found = tokenizer.encode(request.prompt or "", add_bos=request.add_special_tokens)
        texts = [text_and_bytes(tokenizer, token)[0] for token in found]
        return TokenizeAnswer(found, len(found), model.context_length, texts)

    return await _with_model(service, request.model, client, tokens)  # type: ignore[no-any-return]  # generic


async def detokenize(service: Service, request: DetokenizeRequest, client: Client) -> DetokenizeAnswer:
    """Return the text of tokens, without special tokens."""

    def text(model: ServedModel) -> DetokenizeAnswer:
        ids = ids_of(request.tokens, model, "tokens")
        return DetokenizeAnswer(model.running.model.tokenizer.decode(ids))

    return await _with_model(service, request.model, client, text)  # type: ignore[no-any-return]  # generic


async def _with_model(service: Service, name: str | None, client: Client, work: Any) -> Any:
    """Return the result of `work`, called in a thread with the loaded model."""
    deadline = service.deadline()
    with service.admitted(client):
        async with service.models.use(name, deadline - time.monotonic()) as model:
            try:
                return await asyncio.to_thread(work, model)
            except EdgeLMError as error:
                if not is_of_request(error):
                    raise
                raise of_request(error, model.hidden) from error
