"""`GET /parity` and `POST /parity`: does this device compute the same model as the reference?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from edgelm.serving.api.answers import ParityState
from edgelm.serving.api.requests import ModelRequest

if TYPE_CHECKING:
    from edgelm.serving.guard import Client
    from edgelm.serving.service import Service


async def last(service: Service, query: Mapping[str, str | None], client: Client) -> ParityState:
    """Return the last report of the parity check of a model."""
    del client
    return service.parity.state(service.models.find(query["model"]))


async def run(service: Service, request: ModelRequest, client: Client) -> ParityState:
    """Check on this device that a model computes what the reference computes.

    It loads the bundle once more and takes a minute or two for OLMoE. Other requests are slower meanwhile.
    """
    with service.admitted(client):
        model = service.models.find(request.model)
        runtime = None if model.engine is None else model.engine.model.runtime.name
        return await service.parity.run(model, runtime)
