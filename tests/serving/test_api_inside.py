"""Are embeddings, experts and parity reports of the server those of the model?"""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from http_server import HttpServer

from edgelm.bundle import Bundle
from edgelm.serving.tracing import FinalNorm

CHECKPOINTS = Path(__file__).parents[2] / "examples" / "checkpoints"
TEXTS = ["import os", "def add(a, b):\n    return a + b", "class"]


def vectors(answer: Any) -> Any:
    return np.array([one["embedding"] for one in answer["data"]])


def test_an_embedding_is_close_to_that_of_the_float_model(server: HttpServer) -> None:
    import torch
    from transformers import AutoModel

    ids = [server.answer("/tokenize", {"model": "olmoe", "prompt": text})["tokens"] for text in TEXTS]
    float_model = AutoModel.from_pretrained(CHECKPOINTS / "olmoe-tiny", dtype=torch.float32)
    with torch.no_grad():
        states = [float_model(torch.tensor([one])).last_hidden_state[0] for one in ids]
    for pooling, pooled in (("mean", [one.mean(0) for one in states]), ("last", [one[-1] for one in states])):
        answer = server.answer("/v1/embeddings", {"model": "olmoe", "input": TEXTS, "pooling": pooling})
        found = vectors(answer)
        expected = torch.nn.functional.normalize(torch.stack(pooled)).numpy()
        assert np.linalg.norm(found, axis=1) == pytest.approx(1, abs=1e-5)
        assert ((found * expected).sum(axis=1) > 0.95).all()  # int4 weights
        assert answer["usage"] == {"prompt_tokens": sum(map(len, ids)), "total_tokens": sum(map(len, ids))}
        assert [one["index"] for one in answer["data"]] == [0, 1, 2]


def test_the_final_norm_is_that_of_the_checkpoint(tiny_bundle: Callable[..., Path]) -> None:
    import torch
    from transformers import AutoModel

    for name in ("olmoe", "fox"):
        norm = FinalNorm(Bundle.open(tiny_bundle(name, "int4", "native")))
        expected = AutoModel.from_pretrained(CHECKPOINTS / f"{name}-tiny", dtype=torch.float32).norm
        hidden = np.random.default_rng(0).normal(size=(5, expected.weight.shape[0])).astype(np.float32)
        with torch.no_grad():
            assert norm(hidden) == pytest.approx(expected(torch.from_numpy(hidden)).numpy(), abs=1e-5)


def test_an_embedding_does_not_depend_on_its_form_or_its_neighbours(server: HttpServer) -> None:
    together = vectors(server.answer("/v1/embeddings", {"model": "fox", "input": TEXTS}))
    for text, vector in zip(TEXTS, together, strict=True):
        ids = server.answer("/tokenize", {"model": "fox", "prompt": text})["tokens"]
        for given in (text, ids, [text], [ids]):
            alone = vectors(server.answer("/v1/embeddings", {"model": "fox", "input": given}))
            assert alone[0] == pytest.approx(vector, abs=1e-5)
    coded = server.answer("/v1/embeddings", {"model": "fox", "input": TEXTS, "encoding_format": "base64"})
    for one, vector in zip(coded["data"], together, strict=True):
        assert np.frombuffer(base64.b64decode(one["embedding"]), "<f4") == pytest.approx(vector, abs=1e-6)


def test_experts_are_those_of_the_debug_graph(server: HttpServer, tiny_bundle: Callable[..., Path]) -> None:
    from edgelm.runtimes.registry import open_tracing

    prompt, answer = "import os", "\n\nimport sys"
    found = server.answer("/experts", {"model": "olmoe", "prompt": prompt, "answer": answer})
    ids = [token["id"] for token in found["tokens"]]
    assert "".join(token["text"] for token in found["tokens"]) == prompt + answer
    assert (found["num_layers"], found["num_experts"], found["experts_per_token"]) == (4, 32, 4)
    assert server.answer("/tokenize", {"model": "olmoe", "prompt": prompt})["tokens"] == ids[: found["prompt_tokens"]]
    opened = open_tracing(Bundle.open(tiny_bundle("olmoe", "int4", "native")), "onnxruntime-cpu", threads=2)
    assert opened is not None
    with opened as tracing:
        routers = tracing.trace(ids, logits=False).router_logits
    for place, token in enumerate(found["tokens"]):
        for layer, (chosen, weights) in enumerate(zip(token["experts"], token["weights"], strict=True)):
            logits = routers[layer][place].astype(np.float64)
            assert chosen == np.argsort(-logits)[:4].tolist()
            shares = np.exp(logits) / np.exp(logits).sum()
            assert weights == pytest.approx(shares[chosen], abs=1e-4)
    by_ids = server.answer("/experts", {"model": "olmoe", "tokens": ids})
    assert by_ids["tokens"] == found["tokens"]
    assert by_ids["prompt_tokens"] == len(ids)
    talk = {"model": "olmoe", "messages": [{"role": "user", "content": prompt}], "answer": answer}
    assert server.answer("/experts", talk)["prompt_tokens"] > found["prompt_tokens"]


@pytest.mark.parametrize(
    ("path", "data", "param", "said"),
    [
        ("/experts", {"model": "fox", "prompt": "a"}, "model", "dense"),
        ("/experts", {"model": "olmoe"}, "prompt", "give one of"),
        ("/experts", {"model": "olmoe", "prompt": "a", "tokens": [1]}, "prompt", "give one of"),
        ("/experts", {"model": "olmoe", "tokens": [1], "answer": "a"}, "answer", "goes with"),
        ("/experts", {"model": "olmoe", "tokens": [4000]}, "tokens", "from 0 to 2047"),
        ("/v1/embeddings", {"model": "olmoe", "input": []}, "input", "0 entries"),
        ("/v1/embeddings", {"model": "olmoe", "input": [1] * 600}, "input", "600 tokens"),
        ("/v1/embeddings", {"model": "olmoe", "input": "a", "dimensions": 5}, "dimensions", "not supported"),
    ],
)
def test_what_cannot_be_shown_is_refused(server: HttpServer, path: str, data: Any, param: str, said: str) -> None:
    error = server.error(path, data)
    assert error["param"] == param
    assert said in error["message"]


def test_a_parity_check_runs_on_demand(server: HttpServer, tiny_bundle: Callable[..., Path]) -> None:
    assert server.client.get("/parity?model=olmoe").json() == {
        "model": "olmoe", "running": False, "report": None, "sentence": None, "error": None,
    }  # fmt: skip
    checked = server.answer("/parity", {"model": "olmoe"})
    assert checked["report"]["passed"] is True
    assert checked["report"]["format"] == "edgelm-parity"
    assert "same model as the reference" in checked["sentence"]
    last = server.client.get("/parity?model=olmoe")
    assert last.json() == checked
    assert str(tiny_bundle("olmoe", "int4", "native")) not in last.text
    assert server.client.get("/parity").status_code == 400
    assert server.client.get("/parity?model=olmoe&verbose=1").json()["error"]["param"] == "verbose"


def test_a_bundle_without_a_parity_pack_says_so(
    serving: Callable[..., HttpServer], tiny_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    import shutil

    copy = tmp_path / "bundle"
    shutil.copytree(tiny_bundle("olmoe", "int4", "native"), copy)
    running = serving(models={"damaged": copy})
    (copy / "parity" / "pack.json").write_text("{}")
    state = running.answer("/parity", {})
    assert state["report"] is None
    assert "pack.json" in state["error"]
    assert str(tmp_path) not in state["error"]
