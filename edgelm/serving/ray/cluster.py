"""The Ray cluster: connect to it, and check that its machines have the bundles."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import re
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelm.errors import ArgumentValueError, EdgeLMError

if TYPE_CHECKING:
    from edgelm.serving.settings import Settings

LOCAL = "local"
_CHECK_SECONDS = 120


@dataclass(frozen=True)
class Share:
    """What a replica takes of its machine, by Ray's count.

    Attributes:
        cpus: CPUs.
        gpus: GPUs.
        threads: its CPU threads, where it shares the machine with others; None: as the settings say.
    """

    cpus: int
    gpus: int
    threads: int | None = None

    def apply(self, settings: Settings) -> Settings:
        """Return the settings of a replica with this share."""
        if self.threads is None:
            return settings
        return replace(settings, loading={**settings.loading, "threads": self.threads})


@dataclass(frozen=True)
class Machine:
    """A machine of the cluster.

    Attributes:
        id: Ray's name of it.
        address: its IP address.
        cpus: its CPUs, by Ray's count.
        gpus: its GPUs.
    """

    id: str
    address: str
    cpus: int
    gpus: int


def need_ray() -> None:
    """Check that Ray is installed.

    Raises:
        EdgeLMError: it is not; says how to install it.
    """
    from edgelm.installing import install_hint

    if importlib.util.find_spec("ray") is None:
        raise EdgeLMError(f"--ray needs Ray, not installed here: {install_hint('ray')}")


def check_address(address: str) -> str:
    """Return the address of a cluster: "local" for one that is made here, "auto", or HOST:PORT.

    Raises:
        ArgumentValueError: it is none of these.
    """
    host, colon, port = address.rpartition(":")
    if address.startswith("ray://"):
        raise ArgumentValueError(f"{address}: run this on a machine of the cluster, with --ray auto")
    if address in (LOCAL, "auto") or (colon and host and port.isdigit()):
        return address
    raise ArgumentValueError(
        f"{address!r:.100} is no address of a cluster: give auto or HOST:PORT, or --ray alone as the last option for a "
        "cluster on this machine"
    )


@contextlib.contextmanager
def connected(address: str, cpus: int, *, verbose: bool = False) -> Iterator[list[Machine]]:
    """Connect to a cluster for a block, unless this process has a connection already; yield its machines.

    Args:
        address: see `check_address`.
        cpus: how many CPUs a cluster that is made here has, by Ray's count.
        verbose: whether what its processes print is shown here too; it is in Ray's logs anyway.

    Raises:
        EdgeLMError: there is no such cluster, or it has no machine.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else it reports to its makers
    import ray

    ours = not ray.is_initialized()
    if ours:
        given: dict[str, Any] = {"address": address, "logging_level": logging.ERROR, "log_to_driver": verbose}
        if address == LOCAL:
            given |= {"num_cpus": cpus, "include_dashboard": False}
        try:
            with _own_handler(signal.SIGTERM), nothing_to_import() as environment:
                ray.init(runtime_env=environment, **given)
        except (ConnectionError, ValueError, RuntimeError) as error:
            text = str(error).strip().splitlines() or [type(error).__name__]
            raise EdgeLMError(
                f"no connection to the Ray cluster {address}: {text[0]}; is it there, and is RAY_AUTH_TOKEN its token?"
            ) from error
    try:
        yield machines()
    finally:
        if ours:
            ray.shutdown()


@contextlib.contextmanager
def nothing_to_import() -> Iterator[dict[str, Any]]:
    """Yield a `runtime_env` in which Ray's processes import installed packages only.

    Else they import from the folder in which this process was started, wherever there is one of this name.
    """
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "empty").touch()  # Ray refuses a folder without files
        yield {"working_dir": folder}


@contextlib.contextmanager
def _own_handler(number: signal.Signals) -> Iterator[None]:
    """Put back this process's handler of a signal after the block, in which Ray sets its own."""
    handler = signal.getsignal(number)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(number, handler)


def machines() -> list[Machine]:
    """Return the machines of the cluster that are alive."""
    import ray

    found = []
    for node in ray.nodes():
        resources = node["Resources"]
        if node["Alive"]:
            cpus, gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
            found.append(Machine(node["NodeID"], node["NodeManagerAddress"], cpus, gpus))
    return found


def share_of(settings: Settings, found: list[Machine], replicas: int | None) -> tuple[int, Share]:
    """Return the number of replicas and what each takes: a GPU, or CPUs.

    Args:
        settings: settings of a replica. Bundles for a GPU take one.
        found: the machines.
        replicas: how many replicas there are to be; None: one for each device, which is a GPU or a machine.

    Raises:
        EdgeLMError: there are not so many GPUs.
    """
    from edgelm.bundle import Bundle

    on_gpu = any(Bundle.open(path).manifest.target != "cpu" for path in settings.models.values())
    if on_gpu:
        gpus = sum(machine.gpus for machine in found)
        if gpus < (replicas or 1):
            raise EdgeLMError(f"{replicas or 1} replicas need a GPU each, and the cluster has {gpus}")
        return replicas or gpus, Share(0, 1)
    able = [machine.cpus for machine in found if machine.cpus]
    count = replicas or max(1, len(able))
    each = -(-count // max(1, len(able)))
    cpus = settings.loading.get("threads") or max(1, min(able, default=1) // each)
    return count, Share(cpus, 0, cpus if each > 1 else None)


def cpus_here(settings: Settings, replicas: int | None) -> int:
    """Return how many CPUs a cluster on this machine has to have, by Ray's count.

    Args:
        settings: settings of a replica.
        replicas: how many; None: one.
    """
    return max((replicas or 1) * (settings.loading.get("threads") or 1), os.cpu_count() or 1)


def on_every_machine(settings: Settings) -> Settings:
    """Return the settings with absolute paths."""
    models = {name: path.resolve() for name, path in settings.models.items()}
    return replace(settings, models=models, cache_dir=settings.cache_dir and settings.cache_dir.resolve())


def require_bundles(settings: Settings, digests: Mapping[str, str], found: list[Machine]) -> None:
    """Check that each machine has the same bundles at the same places.

    Args:
        settings: which bundles; their paths are absolute.
        digests: digest of the manifest of each.
        found: the machines.

    Raises:
        EdgeLMError: a machine lacks one, has another one, or lacks EdgeLM.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    paths = {name: str(path) for name, path in settings.models.items()}
    task = ray.remote(num_cpus=0, max_retries=1)(bundle_problem)
    asked = {
        machine: task.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(machine.id, soft=False)
        ).remote(paths, dict(digests))
        for machine in found
    }  # fmt: skip
    for machine, answer in asked.items():
        try:
            problem = ray.get(answer, timeout=_CHECK_SECONDS)
        except ray.exceptions.RayError as error:
            text = str(error).strip().splitlines()[-1:] or [""]
            raise EdgeLMError(
                f"the machine {machine.address} cannot check its bundles ({text[0][:200]}): it needs the same "
                "EdgeLM and Python as this one"
            ) from error
        if problem is not None:
            raise EdgeLMError(f"the machine {machine.address}: {problem}")


def error_in(text: str) -> str | None:
    """Return the message of the last error of EdgeLM in the traceback of a process of Ray."""
    found = re.findall(r"^.*\bedgelm\.errors\.\w+: (.+)$", text, re.MULTILINE)
    return found[-1].strip() if found else None


def log_folder() -> str:
    """Return the folder of this machine's logs of the cluster."""
    import ray

    return f"{ray._private.worker._global_node.get_session_dir_path()}/logs"


def bundle_problem(paths: Mapping[str, str], digests: Mapping[str, str]) -> str | None:
    """Return what is wrong with the bundles on this machine.

    Args:
        paths: the folder of each.
        digests: digest of the manifest of each.
    """
    from edgelm.bundle import Bundle
    from edgelm.generation.session_file import manifest_sha256

    for name, path in paths.items():
        try:
            if manifest_sha256(Bundle.open(Path(path))) != digests[name]:
                return f"{path} is another bundle than here: copy it again with `edgelm install`"
        except EdgeLMError as error:
            return str(error)
    return None
