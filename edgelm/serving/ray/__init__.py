"""The server on more than one machine, with Ray Serve: replicas, each of which is the whole application.

    clients -> a proxy of Ray on each machine -> replicas, each with its models loaded

Replicas share nothing. A replica that dies is replaced; the requests that it had fail with a server error, which
clients try again.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgelm.errors import ArgumentValueError, EdgeLMError
from edgelm.serving.ray.cluster import (
    Share,
    connected,
    cpus_here,
    error_in,
    log_folder,
    on_every_machine,
    require_bundles,
    share_of,
)

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from edgelm.serving.settings import Settings

NAME = "edgelm"
ROUTER = "edgelm.serving.ray.router.SessionRouter"


def deployment(
    settings: Settings,
    *,
    replicas: int | tuple[int, int] = 1,
    share: Share = Share(1, 0),  # noqa: B008 - frozen
    verbose: bool = False,
) -> Any:
    """Return the server as an application of Ray Serve, for `ray.serve.run`.

    Args:
        settings: settings of each replica. The paths of the bundles have to be absolute, and the same everywhere. In
            `cache_dir` each replica has a numbered folder, of `cache_dir_bytes`.
        replicas: how many there are; two numbers: at least and at most, by how many requests there are.
        share: what a replica takes of its machine.
        verbose: whether Ray logs each request.
    """
    from ray import serve

    def build() -> ASGIApp:
        from edgelm.serving.app import create_app

        return create_app(replace(settings, cache_dir_shared=True))

    class Server:
        """The deployment: what Ray Serve calls beside the application."""

        async def check_health(self) -> None:
            """Raise an error if the replica has to be replaced."""
            require_healthy(self.app)  # type: ignore[attr-defined]  # from serve.ingress

        async def _run_asgi_lifespan_startup(self) -> None:
            """Load the models. Ray's own error would not say why they cannot be loaded."""
            try:
                await super()._run_asgi_lifespan_startup()  # type: ignore[misc]  # from serve.ingress
            except RuntimeError:
                models = self.app.state.service.models.all.values()  # type: ignore[attr-defined]
                for model in models:
                    if model.problem is not None:
                        raise model.problem from None
                raise

    number: dict[str, Any] = {"num_replicas": replicas}
    if isinstance(replicas, tuple):
        least, most = replicas
        scaling = {"min_replicas": least, "max_replicas": most, "target_ongoing_requests": settings.slots}
        number = {"autoscaling_config": scaling}
    made = serve.deployment(
        name=NAME,
        ray_actor_options={"num_cpus": share.cpus, "num_gpus": share.gpus},
        # So many that a slot never waits for its next request; the others wait where any replica can get them.
        max_ongoing_requests=2 * settings.slots,
        max_queued_requests=settings.limits.queue,
        graceful_shutdown_timeout_s=settings.finish_seconds,
        request_router_config={"request_router_class": ROUTER},
        logging_config=_logging(verbose),
        **number,
    )(serve.ingress(build)(Server))
    return made.bind()


def _logging(verbose: bool) -> dict[str, Any]:
    return {"log_level": "INFO" if verbose else "WARNING", "enable_access_log": verbose}


def require_healthy(app: Any) -> None:
    """Check that each loaded model's engine runs.

    Raises:
        EdgeLMError: one has ended.
    """
    for model in app.state.service.models.all.values():
        if model.engine is not None and not model.engine.alive:
            raise EdgeLMError(f"the engine of {model.name} has ended")


def serve_on_ray(
    settings: Settings,
    host: str,
    port: int,
    address: str,
    *,
    replicas: int | tuple[int, int] | None,
    verbose: bool,
    ready: Callable[[str], None],
) -> None:
    """Serve on a Ray cluster until Ctrl-C or SIGTERM.

    Args:
        settings: settings of each replica.
        host: address to listen on, on each machine.
        port: port to listen on.
        address: the cluster, see `check_address`.
        replicas: as in `deployment`; None: one for each device.
        verbose: as in `deployment`.
        ready: called with the server's URL when it can be used.

    Raises:
        EdgeLMError: the address is in use, a machine lacks a bundle, or a model cannot be loaded.
        KeyboardInterrupt: the server was stopped.
    """
    from edgelm.serving.batch import digests_of

    _require_free(host, port)
    settings = on_every_machine(settings)
    most = replicas[1] if isinstance(replicas, tuple) else replicas
    with connected(address, cpus_here(settings, most), verbose=verbose) as machines:
        from ray import serve

        require_bundles(settings, digests_of(settings), machines)
        count, share = share_of(settings, machines, most)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        options = {"host": host, "port": port}
        serve.start(proxy_location="EveryNode", http_options=options, logging_config=_logging(verbose))
        try:
            number = replicas if isinstance(replicas, tuple) else count
            app = deployment(share.apply(settings), replicas=number, share=share, verbose=verbose)
            try:
                serve.run(app, name=NAME, route_prefix="/")
            except RuntimeError as error:
                raise EdgeLMError(f"the replicas could not start: {_reason(serve)}") from error
            ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")
            while True:
                time.sleep(1)
        finally:
            serve.delete(NAME)


def _require_free(host: str, port: int) -> None:
    try:
        with socket.create_server((host.strip("[]"), port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass
    except OSError as error:
        raise EdgeLMError(
            f"cannot listen on {host}, port {port}: {error.strerror or error}; give another --host or --port"
        ) from error
    if port == 0:
        raise ArgumentValueError("--port 0: every machine of a Ray cluster listens on one port, give its number")


def _reason(serve: Any) -> str:
    """Return why the application is not healthy, by Ray Serve."""
    found = serve.status().applications.get(NAME)
    deployed = found.deployments.get(NAME) if found is not None else None
    return error_in(deployed.message if deployed is not None else "") or f"{log_folder()} has the reason"
