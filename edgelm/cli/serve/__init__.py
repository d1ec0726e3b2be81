"""`edgelm serve`: serve models over HTTP."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import click

from edgelm.cli.common.cluster import cluster_options
from edgelm.cli.common.help import Group, option, verb
from edgelm.cli.common.options import PATH, Number, Size, Whole, given, loading_options, together

PACKAGES = ("anyio", "starlette", "uvicorn", "llguidance")

access_options = together(
    "access",
    option(
        "--api-key-file", group=Group.ACCESS, metavar="FILE", type=PATH, default_text="no keys",
        help="One key a line, each perhaps after `NAME:`. Requests need one of them. Only you may read FILE.",
    ),
    option(
        "--allow-anyone", group=Group.ACCESS, is_flag=True,
        help="Let everybody who can reach --host use the server without a key.",
    ),
    option(
        "--allow-host", group=Group.ACCESS, multiple=True, metavar="NAME",
        help="A further name under which a server on this machine is reached, such as a proxy's. May be repeated.",
    ),
    option(
        "--allow-origin", group=Group.ACCESS, multiple=True, metavar="URL",
        help="A web page that may use the server, such as https://example.org. May be repeated.",
    ),
)  # fmt: skip

limit_options = together(
    "limits",
    option(
        "--max-tokens", group=Group.LIMITS, type=Whole(min=1), default_text="the context",
        help="Tokens of an answer at most.",
    ),
    option(
        "--max-prompt-tokens", "prompt_tokens", group=Group.LIMITS, type=Whole(min=1), default_text="the context",
        help="Tokens of a prompt at most.",
    ),
    option(
        "--max-body", "body_bytes", group=Group.LIMITS, metavar="SIZE", type=Size(), default_text="4MiB",
        help="Size of a request at most.",
    ),
    option(
        "--max-seconds", "seconds", group=Group.LIMITS, type=Number(min=0, min_open=True), default_text="600",
        help="Time of a request at most, with its wait.",
    ),
    option(
        "--max-requests", "per_key", group=Group.LIMITS, type=Whole(min=1), default_text="64",
        help="Requests of a key, or of an address, at a time.",
    ),
    option(
        "--max-waiting", "queue", group=Group.LIMITS, type=Whole(min=1), default_text="64",
        help="Sequences of a model that may wait for a slot.",
    ),
    make=given,
)  # fmt: skip

cache_options = together(
    "caching",
    option(
        "--slots", group=Group.RESOURCES, type=Whole(1, 1024), default_text="4",
        help="Sequences of a model that decode together. Each needs a KV cache of its own.",
    ),
    option(
        "--memory", group=Group.RESOURCES, metavar="SIZE", type=Size(), default_text="no limit",
        help="Memory that loaded models may take, by estimate. Beyond it the model that was not used for the longest "
        "time is unloaded.",
    ),
    option(
        "--prefix-cache", "prefix_bytes", group=Group.RESOURCES, metavar="SIZE", type=Size(), default_text="1GiB",
        help="Memory of a model for computed prompts, which later prompts that begin alike reuse.",
    ),
    option(
        "--cache-dir", group=Group.RESOURCES, metavar="DIR", type=PATH, default_text="no folder",
        help="Keep computed prompts in DIR too, over a restart.",
    ),
    option(
        "--cache-dir-size", "cache_dir_bytes", group=Group.RESOURCES, metavar="SIZE", type=Size(), default_text="8GiB",
        help="Size of all files in --cache-dir.",
    ),
    make=given,
)  # fmt: skip


@verb(example="edgelm serve olmoe")
@click.argument("bundles", metavar="BUNDLE...", nargs=-1, required=True)
@option("--host", default="127.0.0.1", metavar="ADDRESS", help="Address to listen on.")
@option("--port", default=8080, type=Whole(0, 65535), help="Port to listen on; 0: any that is free.")
@option("--load-later", is_flag=True, help="Load each model with its first request, not at start.")
@option(
    "--finish-seconds",
    type=Number(min=0),
    default=30.0,
    help="When the server is stopped, how long running requests may take to finish.",
)
@option("-v", "--verbose", is_flag=True, help="Print a line for each request on standard error.")
@access_options
@limit_options
@cache_options
@cluster_options(scaling=True)
@loading_options
def serve(
    bundles: tuple[str, ...],
    host: str,
    port: int,
    load_later: bool,
    finish_seconds: float,
    verbose: bool,
    access: dict[str, Any],
    limits: dict[str, Any],
    caching: dict[str, Any],
    cluster: dict[str, Any] | None,
    loading: dict[str, Any],
) -> None:
    """Serve models over HTTP with an API like OpenAI's.

    A model has the name of its bundle's folder; NAME=BUNDLE gives it another one. Ctrl-C and SIGTERM let running
    requests finish. Clients: base URL http://127.0.0.1:8080/v1.
    """
    need_serve_extra()
    from edgelm.cli.serve.run import run_server
    from edgelm.serving.settings import Limits, Settings, named_bundles, read_keys

    key_file: Path | None = access["api_key_file"]
    keys = () if key_file is None else read_keys(key_file)
    require_safe(host, keys=bool(keys), anyone=access["allow_anyone"])
    settings = Settings(
        models=named_bundles(bundles),
        loading=loading,
        preload=not load_later,
        keys=keys,
        origins=tuple(access["allow_origin"]),
        hosts=allowed_hosts(host, access["allow_host"]),
        limits=Limits(**limits),
        finish_seconds=finish_seconds,
        **caching,
    )
    if cluster is None:
        run_server(settings, host, port, verbose=verbose)
    else:
        from edgelm.serving.ray import serve_on_ray

        def ready(url: str) -> None:
            print(f"{url}  ({', '.join(settings.models)}; API at /v1)", flush=True)

        serve_on_ray(settings, host, port, **cluster, verbose=verbose, ready=ready)


def need_serve_extra() -> None:
    """Check that the packages of the extra `serve` are installed.

    Raises:
        EdgeLMError: names what is missing and how to install it.
    """
    from edgelm.errors import EdgeLMError
    from edgelm.installing import install_hint

    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise EdgeLMError(f"this command needs {', '.join(missing)}, not installed here: {install_hint('serve')}")


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach an address."""
    import ipaddress

    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def require_safe(host: str, *, keys: bool, anyone: bool) -> None:
    """Check that not everybody on the network may use the server unless that is wanted.

    Raises:
        click.UsageError: there are no keys, and other machines could use the server; or both were given.
    """
    if keys and anyone:
        raise click.UsageError("--allow-anyone and --api-key-file contradict each other: give one")
    if not keys and not anyone and not is_loopback(host):
        raise click.UsageError(
            f"--host {host} lets other machines use the server: give --api-key-file FILE, or --allow-anyone if "
            "everybody there may use it"
        )


def allowed_hosts(host: str, more: tuple[str, ...]) -> tuple[str, ...] | None:
    """Return the names that the header `Host` may have; None: any.

    A web page can give its own name the address 127.0.0.1 (DNS rebinding), so a server on this machine answers to its
    own names alone.
    """
    if not is_loopback(host) and not more:
        return None
    return tuple(dict.fromkeys(["localhost", "127.0.0.1", "::1", host.strip("[]").lower(), *map(str.lower, more)]))
