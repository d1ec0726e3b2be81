"""`POST /v1/embeddings` and `POST /experts`: what lies inside the model, from its debug graph."""

from __future__ import annotations

import asyncio
import base64
import time
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import EdgeLMError
from edgelm.serving.api.answers import Embedding, EmbeddingsAnswer, EmbeddingsUsage, ExpertsAnswer, ExpertsToken
from edgelm.serving.api.errors import invalid, is_of_request, of_request
from edgelm.serving.api.requests import EmbeddingsRequest, ExpertsRequest
from edgelm.serving.conversation import conversation_tokens
from edgelm.serving.endpoints.completions import ids_of, inputs
from edgelm.serving.generating import require_prompt
from edgelm.serving.token_texts import text_and_bytes
from edgelm.serving.tracing import FinalNorm

if TYPE_CHECKING:
    from edgelm.runtimes.tracing import Trace
    from edgelm.serving.guard import Client
    from edgelm.serving.models import ServedModel
    from edgelm.serving.service import Service

MOST_TOKENS = 2048
"""Tokens of a text whose experts are returned: 2 MB of JSON for OLMoE."""


async def embeddings(service: Service, request: EmbeddingsRequest, client: Client) -> EmbeddingsAnswer:
    """Return embeddings of texts: the last hidden states, pooled and normalised to length 1."""
    deadline = service.deadline()
    with service.admitted(client):
        async with service.models.use(request.model, deadline - time.monotonic()) as model:
            try:
                texts = await asyncio.to_thread(_texts, service, request, model)
                traces = await service.tracer.trace(model, texts)
                vectors = await asyncio.to_thread(_pooled, request, model, traces)
            except EdgeLMError as error:
                if not is_of_request(error):
                    raise
                raise of_request(error, model.hidden, "input") from error
            count = sum(map(len, texts))
            found = [Embedding("embedding", index, vector) for index, vector in enumerate(vectors)]
            return EmbeddingsAnswer("list", found, model.name, EmbeddingsUsage(count, count))


def _texts(service: Service, request: EmbeddingsRequest, model: ServedModel) -> list[list[int]]:
    texts = [ids_of(one, model, "input") for one in inputs(request.input, "input")]
    for text in texts:
        require_prompt(len(text), model, service, "input")
    return texts


def _pooled(request: EmbeddingsRequest, model: ServedModel, traces: list[Trace]) -> list[list[float] | str]:
    norm = model.once("final norm", lambda: FinalNorm(model.bundle))
    found: list[list[float] | str] = []
    for trace in traces:
        hidden = norm(trace.hidden[-1])  # [T, D]
        vector: NDArray[np.float32] = hidden[-1] if request.pooling == "last" else hidden.mean(axis=0)
        vector = (vector / max(float(np.linalg.norm(vector)), 1e-12)).astype("<f4")
        as_text = request.encoding_format == "base64"
        found.append(base64.b64encode(vector.tobytes()).decode() if as_text else vector.tolist())
    return found


async def experts(service: Service, request: ExpertsRequest, client: Client) -> ExpertsAnswer:
    """Return the experts that each token of a text uses in each layer of a MoE model."""
    deadline = service.deadline()
    with service.admitted(client):
        async with service.models.use(request.model, deadline - time.monotonic()) as model:
            if not model.bundle.manifest.model.num_experts:
                raise invalid("model", f"{model.name} has no experts: it is a dense model")
            try:
                tokens, prompt = await asyncio.to_thread(_tokens, service, request, model)
                (trace,) = await service.tracer.trace(model, [tokens])
                return await asyncio.to_thread(_chosen, model, tokens, prompt, trace)
            except EdgeLMError as error:
                if not is_of_request(error):
                    raise
                raise of_request(error, model.hidden) from error


def _tokens(service: Service, request: ExpertsRequest, model: ServedModel) -> tuple[list[int], int]:
    """Return the tokens of a request, and how many of them are the prompt's."""
    given = [name for name in ("tokens", "prompt", "messages") if getattr(request, name) is not None]
    if len(given) != 1:
        raise invalid(given[1] if given else "prompt", "give one of tokens, prompt and messages")
    if request.tokens is not None:
        if request.answer is not None:
            raise invalid("answer", "answer goes with prompt or messages")
        tokens = ids_of(request.tokens, model, "tokens")
    elif request.messages is not None:
        tokens = conversation_tokens(model, request.messages)
    else:
        tokens = ids_of(request.prompt or "", model, "prompt")
    prompt = len(tokens)
    if request.answer is not None:
        tokens = tokens + model.running.model.tokenizer.encode(request.answer, add_bos=False)
    require_prompt(len(tokens), model, service, given[0])
    if len(tokens) > MOST_TOKENS:
        raise invalid(given[0], f"the text has {len(tokens)} tokens: give {MOST_TOKENS} at most")
    return tokens, prompt


def _chosen(model: ServedModel, tokens: list[int], prompt: int, trace: Trace) -> ExpertsAnswer:
    info, tokenizer = model.bundle.manifest.model, model.running.model.tokenizer
    experts, weights = [], []
    for logits in trace.router_logits:  # [T, E]
        order = np.argsort(-logits, axis=-1, kind="stable")[:, : info.experts_per_token]
        exponents = np.exp(logits - logits.max(axis=-1, keepdims=True))
        shares = np.take_along_axis(exponents / exponents.sum(axis=-1, keepdims=True), order, axis=-1)
        if info.norm_topk_prob:
            shares /= shares.sum(axis=-1, keepdims=True)
        experts.append(order.tolist())
        weights.append(np.round(shares.astype(np.float64), 5).tolist())
    found = [
        ExpertsToken(
            token,
            text_and_bytes(tokenizer, token)[0],
            [layer[place] for layer in experts],
            [layer[place] for layer in weights],
        )
        for place, token in enumerate(tokens)
    ]
    return ExpertsAnswer(model.name, info.num_layers, info.num_experts, info.experts_per_token, prompt, found)
