"""All operations of the HTTP API."""

from __future__ import annotations

from edgelm.serving.api import answers, requests
from edgelm.serving.api.openapi import Operation
from edgelm.serving.api.responses import ResponsesAnswer, ResponsesRequest
from edgelm.serving.endpoints import chat, completions, hidden_states, parity, responses, server

OPERATIONS = (
    Operation("GET", "/v1/models", server.models, None, answers.ModelList),
    Operation(
        "POST", "/v1/chat/completions", chat.create, requests.ChatRequest, answers.ChatAnswer, stream=True
    ),
    Operation(
        "POST", "/v1/completions", completions.create, requests.CompletionRequest, answers.CompletionAnswer, stream=True
    ),
    Operation(
        "POST", "/v1/responses", responses.create, ResponsesRequest, ResponsesAnswer, stream=True
    ),
    Operation(
        "POST", "/v1/embeddings", hidden_states.embeddings, requests.EmbeddingsRequest, answers.EmbeddingsAnswer
    ),
    Operation("POST", "/experts", hidden_states.experts, requests.ExpertsRequest, answers.ExpertsAnswer),
    Operation(
        "GET", "/parity", parity.last, None, answers.ParityState,
        query=(("model", "name of the model; may be missing where the server has only one"),),
    ),
    Operation("POST", "/parity", parity.run, requests.ModelRequest, answers.ParityState),
    Operation("POST", "/tokenize", server.tokenize, requests.TokenizeRequest, answers.TokenizeAnswer),
    Operation("POST", "/detokenize", server.detokenize, requests.DetokenizeRequest, answers.DetokenizeAnswer),
    Operation("POST", "/models/load", server.load, requests.ModelRequest, answers.ModelEntry),
    Operation("POST", "/models/unload", server.unload, requests.ModelRequest, answers.ModelEntry),
    Operation("GET", "/health", server.health, None, answers.Health, open=True),
    Operation("GET", "/metrics", server.metrics, None, None),
)  # fmt: skip
