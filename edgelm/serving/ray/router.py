"""Which replica answers a request: the one of its session, else the less busy of two.

A conversation whose messages go to one replica finds its prompts computed there. Ray's own router that looks at the
prompt (PrefixCacheAffinityRouter) is for its LLM servers: it sees calls of Python, and of HTTP only the headers. So a
client says what belongs together, with a header `x-session-id`.
"""

from __future__ import annotations

import random

from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter
from ray.serve.request_router import PendingRequest, RunningReplica


class SessionRouter(ConsistentHashRouter):  # type: ignore[misc]  # Ray's classes have no types here
    """Ray's router of sessions, by consistent hashing, which would place other requests at random."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return groups of replicas in the order in which to try them; Ray takes the least busy of a group."""
        if pending_request is None or pending_request.metadata.session_id:
            return await super().choose_replicas(candidate_replicas, pending_request)  # type: ignore[no-any-return]
        return [random.sample(list(candidate_replicas), min(2, len(candidate_replicas)))]
