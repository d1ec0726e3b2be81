"""Does the server keep to its OpenAPI document, whatever schemathesis sends?"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import schemathesis
from http_server import HttpServer
from schemathesis.specs.openapi.checks import positive_data_acceptance

from edgelm.serving.api import requests
from edgelm.serving.api.openapi import described as described_fields
from edgelm.serving.api.openapi import document
from edgelm.serving.api.responses import ResponsesRequest
from edgelm.serving.endpoints.operations import OPERATIONS
from edgelm.serving.settings import Limits, Settings


@pytest.fixture(scope="module")
def limited(tiny_bundle: Callable[..., Path]) -> Iterator[HttpServer]:
    """A server whose answers are short, so that many requests can be tried."""
    limits = Limits(max_tokens=4, prompt_tokens=64, seconds=30)
    models = {"olmoe": tiny_bundle("olmoe", "int4", "native")}
    with HttpServer(Settings(models=models, loading={"threads": 2}, limits=limits)) as running:
        yield running


@pytest.fixture(scope="module")
def described(limited: HttpServer) -> Any:
    return schemathesis.openapi.from_url(f"{limited.url}/openapi.json")


@pytest.mark.parametrize(("method", "path"), [(operation.method, operation.path) for operation in OPERATIONS])
def test_any_request_has_an_answer_of_the_document(described: Any, method: str, path: str) -> None:
    # Not schemathesis's plugin: it does not work with pytest 9.
    @hypothesis.given(case=described[path][method].as_strategy())
    @hypothesis.settings(
        max_examples=20, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    def ask(case: Any) -> None:
        # A request that fits the schema may still be refused: no model has its name, or fields contradict each other.
        case.call_and_validate(timeout=60, excluded_checks=[positive_data_acceptance])

    ask()


@pytest.mark.parametrize(
    ("path", "data"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/responses", {"input": "a"}),
    ],
)
def test_a_stream_is_of_the_document(described: Any, path: str, data: Any) -> None:
    case = described[path]["POST"].Case(body={**data, "stream": True}, media_type="application/json")
    response = case.call(timeout=60)
    assert response.headers["content-type"][0].startswith("text/event-stream")
    case.validate_response(response)


def test_the_schemas_are_valid_and_complete() -> None:
    import jsonschema_rs

    described = json.loads(json.dumps(document(OPERATIONS, keys=True)))
    schemas = described["components"]["schemas"]
    for schema in schemas.values():
        jsonschema_rs.meta.validate({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema})
    references = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(described)))
    assert references == set(schemas)


def test_every_request_is_an_operation_and_is_described() -> None:
    paths = document(OPERATIONS, keys=False)["paths"]
    bodies = {operation.request for operation in OPERATIONS} - {None}
    wanted = {value for name, value in vars(requests).items() if name.endswith("Request") and isinstance(value, type)}
    assert wanted <= bodies
    for path, methods in paths.items():
        for method in methods.values():
            assert method["summary"].endswith("."), path
            assert "200" in method["responses"], path


def test_the_page_of_the_server_has_every_address_and_field() -> None:
    page = (Path(__file__).parents[2] / "docs" / "reference" / "server.md").read_text(encoding="utf-8")
    for operation in OPERATIONS:
        assert f"`{operation.path}`" in page
    for cls in (value for operation in OPERATIONS if (value := operation.request) is not None):
        rows = {f"| `{name}` | {text} |" for name, text in described_fields(cls).items()}
        missing = [row for row in rows if row not in page]
        if cls not in (requests.ModelRequest, requests.DetokenizeRequest, ResponsesRequest):
            assert missing == [], cls
        for row in missing:
            assert f"`{row.split('`')[1]}`" in page, row
