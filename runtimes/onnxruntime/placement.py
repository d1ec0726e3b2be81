"""Where ONNX Runtime put every node of a graph. A provider without a kernel hands its nodes to the processor, silently.

Such a node costs two copies over the bus at every token and computes in another type than was asked for; nothing says
so. Here it is an error that names it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgelm.errors import RuntimeUnavailableError

if TYPE_CHECKING:
    import onnxruntime  # type: ignore[import-untyped]  # it has no type information

ON_HOST = frozenset({"total/Gather", "total_sequence_length_int32/Cast"})
"""Nodes that belong on the processor: they read the length of the mask, a shape, which attention wants on the host."""

_SHOWN = 4


@dataclass(frozen=True)
class Placed:
    """A node of the optimised graph and the provider that runs it."""

    name: str
    op: str
    provider: str

    def __str__(self) -> str:
        return f"{self.name or 'a node without a name'} ({self.op})"


def record_placement(options: Any) -> None:
    """Have a session, of which these are the options, remember where its nodes go."""
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")


def placement(session: onnxruntime.InferenceSession) -> list[Placed]:
    """Every node of a session that was made with `record_placement`."""
    return [
        Placed(node.name, f"{node.domain or 'ai.onnx'}.{node.op_type}", part.ep_name)
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    ]


def check_placement(
    session: onnxruntime.InferenceSession, provider: str, graph: str, allowed: Collection[str] = ON_HOST
) -> None:
    """Refuse a session some of whose nodes another provider runs; `allowed` are names of nodes that it may.

    Raises:
        RuntimeUnavailableError: naming the nodes and their operators.
    """
    nodes = placement(session)
    if not nodes:
        raise RuntimeUnavailableError(
            f"ONNX Runtime does not say where it runs the nodes of {graph}: another version of it is needed"
        )
    elsewhere = [node for node in nodes if node.provider != provider and node.name not in allowed]
    if elsewhere:
        shown = ", ".join(map(str, elsewhere[:_SHOWN]))
        more = f" and {len(elsewhere) - _SHOWN} more" if len(elsewhere) > _SHOWN else ""
        raise RuntimeUnavailableError(
            f"{provider} has no kernel for {len(elsewhere)} of {len(nodes)} nodes of {graph}, which "
            f"{', '.join(sorted({node.provider for node in elsewhere}))} would run instead: {shown}{more}; export the "
            "bundle again with this version of EdgeLM, or install another version of ONNX Runtime"
        )
