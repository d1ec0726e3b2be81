"""Does a Ray cluster answer like one machine, and go on when one of its processes is killed?

A real cluster on this machine, with two replicas of the tiny model.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openai
import psutil
import pytest
from click.testing import CliRunner

from edgelm.cli.main import cli
from edgelm.errors import EdgeLMError
from edgelm.progress import Silent
from edgelm.serving.app import create_app
from edgelm.serving.batch import batch_settings, digests_of, reader_for, run_batch, run_here
from edgelm.serving.batch.in_process import InProcess
from edgelm.serving.settings import Settings

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'edgelm[ray]'")
pytest.importorskip("ray.serve", reason="Ray Serve is not installed: pip install 'edgelm[ray]'")

from edgelm.serving.ray import deployment, require_healthy  # noqa: E402 - needs Ray
from edgelm.serving.ray.cluster import (  # noqa: E402
    Machine,
    Share,
    check_address,
    machines,
    nothing_to_import,
    on_every_machine,
    require_bundles,
    share_of,
)
from edgelm.serving.ray.data import Replica, Tries, _chunks, _read, run_on_ray  # noqa: E402

Bundles = Callable[[str, str, str], Path]

# Ray itself leaves files and sockets open.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning:ray")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with nothing_to_import() as environment:
            ray.init(
                address="local", num_cpus=2, object_store_memory=100 << 20, include_dashboard=False,
                logging_level="ERROR", runtime_env=environment,
            )  # fmt: skip
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def settings(tiny_bundle: Bundles) -> Settings:
    models = {"tiny": tiny_bundle("olmoe", "int4", "native")}
    return on_every_machine(batch_settings(Settings(models=models, loading={"threads": 1}, slots=2)))


def requests_in(folder: Path, count: int, **more: Any) -> Path:
    path = folder / "in.jsonl"
    with path.open("w") as stream:
        for n in range(count):
            body = {"model": "tiny", "prompt": f"{n} times", "max_tokens": 1 + n % 30, "temperature": 0, **more}
            request = {"custom_id": f"id-{n}", "method": "POST", "url": "/v1/completions", "body": body}
            stream.write(json.dumps(request) + "\n" * (1 + (n % 7 == 0)))
    return path


def texts(path: Path) -> list[tuple[str, str]]:
    answers = [json.loads(line) for line in path.read_bytes().splitlines()]
    return [(a["custom_id"], a["response"]["body"]["choices"][0]["text"]) for a in answers]


class Notes(Silent):
    """Keeps what a run says."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, message: str) -> None:
        self.lines.append(message)

    @property
    def replicas(self) -> list[int]:
        """The process ids of the replicas that answered, the first one first."""
        return [int(found[1]) for line in self.lines if (found := re.match(r"answers of the replica (\d+) ", line))]


def test_a_replica_is_killed_in_the_middle_and_every_line_is_answered_once_in_order(
    cluster: None, settings: Settings, tmp_path: Path
) -> None:
    """In a run that goes on after 17 answers of another one, which was stopped within a line."""
    source, notes, reader = requests_in(tmp_path, 200), Notes(), reader_for(settings)
    here, target = tmp_path / "here.jsonl", tmp_path / "out.jsonl"
    run_batch(source, here, reader, run_here(settings))
    target.write_bytes(b"".join(here.read_bytes().splitlines(keepends=True)[:18])[:-5])
    run, killed, done = run_on_ray(settings, "local", replicas=2, progress=notes), [], 0

    def run_and_kill(path: Path, skip: int, given: Any, write: Any) -> None:
        def counted(answer: Any) -> None:
            nonlocal done
            write(answer)
            done += 1
            if done >= 20 and len(notes.replicas) == 2 and not killed:
                killed.append(notes.replicas[0])
                os.kill(killed[0], signal.SIGKILL)

        run(path, skip, given, counted)

    report = run_batch(source, target, reader, run_and_kill)
    assert killed and (report.requests, report.kept, report.failed) == (200, 17, 0)
    assert texts(target) == texts(here)
    # What happened can be read afterwards.
    assert re.match(r"replicas: 2, of 1 CPU each; machines: 1; logs: ", notes.lines[0])
    assert len(notes.replicas) >= 2 and notes.replicas.count(killed[0]) == 1
    logs = Path(notes.lines[0].rpartition("logs: ")[2])
    assert any(str(killed[0]) in path.name for path in logs.iterdir())
    assert f"{killed[0]}" in "".join(path.read_text(errors="replace") for path in logs.glob("raylet*"))


def test_a_replica_that_cannot_load_its_model_is_one_error_with_the_reason(
    cluster: None, settings: Settings, tmp_path: Path
) -> None:
    arguments = ["batch", str(requests_in(tmp_path, 3)), str(tmp_path / "out.jsonl"), "--context-length", "1000000"]
    bundle = f"tiny={settings.models['tiny']}"
    result = CliRunner().invoke(cli, [*arguments, "--bundle", bundle, "--threads", "1", "--ray", "auto"])
    assert result.exit_code == 1
    assert "error: a replica failed: context_length is 1000000: give 1 to 512, the model's limit" in result.stderr
    assert not (tmp_path / "out.jsonl").read_bytes()


def test_two_replicas_serve_and_requests_go_on_when_one_is_killed(
    cluster: None, settings: Settings, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-P", "-m", "edgelm", "serve", f"tiny={settings.models['tiny']}", "--port", str(port)),
        *("--ray", ray.get_runtime_context().gcs_address, "--replicas", "2", "--threads", "1", "--slots", "2"),
        *("--cache-dir", "cache"),
    ]
    errors = (tmp_path / "errors").open("w+b")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, cwd=tmp_path) as process, errors:
        assert process.stdout is not None
        line = process.stdout.readline().decode()
        assert line == f"http://127.0.0.1:{port}  (tiny; API at /v1)\n", (tmp_path / "errors").read_text()
        _ask_while_one_is_killed(f"http://127.0.0.1:{port}/v1")
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 130, (tmp_path / "errors").read_text()
    assert "Traceback" not in (tmp_path / "errors").read_text()
    assert not _serving()
    # Each replica has a folder, and the one that was started anew that of the killed one.
    assert sorted(folder.name for folder in (tmp_path / "cache").iterdir()) == ["0", "1"]
    assert all(list(folder.glob("*.block")) for folder in (tmp_path / "cache").iterdir())


def _serving() -> list[psutil.Process]:
    """The processes of the replicas."""
    family = psutil.Process().children(recursive=True)
    return [process for process in family if process.name().startswith("ray::ServeReplica")]


def _ask_while_one_is_killed(url: str) -> None:
    # Requests that the killed replica had fail with a server error, which this client, as OpenAI's does, tries again.
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=5)

    def ask(session: str | None = None) -> tuple[str, int]:
        headers = {} if session is None else {"x-session-id": session}
        answer = client.completions.create(
            model="tiny", prompt="Once upon a time, " * 20, max_tokens=8, temperature=0, extra_headers=headers
        )
        assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
        return answer.choices[0].text, answer.usage.prompt_tokens_details.cached_tokens or 0

    assert [model.id for model in client.models.list()] == ["tiny"]
    # A session stays with its replica, which has computed the prompt already.
    expected, cached = ask("a")
    assert cached == 0
    assert all(ask("a")[1] > 64 for _ in range(6))
    assert {ask(f"{n}")[1] > 64 for n in range(20)} == {True, False}, "all sessions are with one replica"

    replicas = _serving()
    assert len(replicas) == 2
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(ask) for _ in range(10)]
        os.kill(replicas[0].pid, signal.SIGKILL)
        answers += [pool.submit(ask) for _ in range(40)]
        assert {answer.result()[0] for answer in answers} == {expected}
    streamed = client.completions.create(
        model="tiny", prompt="Once upon a time, " * 20, max_tokens=8, temperature=0, stream=True
    )
    assert "".join(part.choices[0].text for part in streamed) == expected
    until = time.monotonic() + 120
    while len({process.pid for process in _serving()} - {replicas[0].pid}) < 2:
        assert time.monotonic() < until, "the killed replica has no successor"
        time.sleep(0.1)


def test_a_dead_engine_is_unhealthy(settings: Settings) -> None:
    app = create_app(settings)

    async def work() -> None:
        client = InProcess(app)
        await client.start()
        require_healthy(app)
        app.state.service.models.all["tiny"].engine.close()
        with pytest.raises(EdgeLMError, match="the engine of tiny has ended"):
            require_healthy(app)
        app.state.service.models.all["tiny"].engine = None
        await client.stop()

    asyncio.run(work())


def test_a_machine_without_the_bundle_or_with_another_is_named(
    cluster: None, settings: Settings, tiny_bundle: Bundles, tmp_path: Path
) -> None:
    found, digests = machines(), digests_of(settings)
    assert len(found) == 1 and found[0].cpus == 2
    require_bundles(settings, digests, found)
    other = replace(settings, models={"tiny": tiny_bundle("fox", "int4", "native")})
    with pytest.raises(EdgeLMError, match=rf"the machine {found[0].address}: .* is another bundle than here"):
        require_bundles(other, digests, found)
    nowhere = replace(settings, models={"tiny": tmp_path / "none"})
    with pytest.raises(EdgeLMError, match=rf"the machine {found[0].address}: .*none does not exist"):
        require_bundles(nowhere, digests, found)
    gone = Machine("ab" * 28, "198.51.100.1", 1, 0)
    with pytest.raises(EdgeLMError, match=r"the machine 198.51.100.1 cannot check its bundles"):
        require_bundles(settings, digests, [gone])


def test_requests_that_kill_their_replica_are_not_tried_for_ever(
    cluster: None, settings: Settings, tmp_path: Path
) -> None:
    """The count is Ray's actor; this process is the replica."""
    tries = ray.remote(num_cpus=0)(Tries).remote()
    replica = Replica(settings, reader_for(settings), tries)
    chunk = _read({"offset": np.array([0]), "before": np.array([0]), "count": np.array([2])}, requests_in(tmp_path, 3))
    for _ in range(4):
        assert replica(chunk)["status"].tolist() == [200, 200]
    with pytest.raises(EdgeLMError, match=r"a replica died 4 times with lines 1 to 3 of the requests"):
        replica(chunk)


def test_replicas_share_the_machines(settings: Settings) -> None:
    def shared(replicas: int | None, *cpus: int, **loading: Any) -> tuple[int, Share]:
        found = [Machine(f"{n}", f"{n}", one, 0) for n, one in enumerate(cpus)]
        return share_of(replace(settings, loading=loading), found, replicas)

    assert shared(None, 8) == (1, Share(8, 0))
    assert shared(None, 8, 4, 0) == (2, Share(4, 0))
    assert shared(4, 8, 8) == (4, Share(4, 0, 4))
    assert shared(3, 8, 8) == (3, Share(4, 0, 4))
    assert shared(9, 4) == (9, Share(1, 0, 1))
    assert shared(2, 8, threads=3) == (2, Share(3, 0, 3))
    assert Share(4, 0, 4).apply(settings).loading["threads"] == 4
    assert Share(4, 0).apply(settings) is settings


def test_chunks_are_all_requests_once(tmp_path: Path) -> None:
    source = requests_in(tmp_path, 23)
    source.write_bytes(b"\n \n" + source.read_bytes().rstrip())
    lines = [line for line in source.read_bytes().splitlines() if line.strip()]
    for skip in (0, 1, 7, 22):
        for size in (1, 4, 23, 50):
            chunks = _chunks(source, skip, size)
            assert len(chunks) == -(-(23 - skip) // size)
            found = [_read({name: np.array([value]) for name, value in one.items()}, source) for one in chunks]
            assert [line.rstrip(b"\n") for one in found for line in one["line"]] == lines[skip:]
            numbers = [number for one in found for number in one["number"].tolist()]
            assert [source.read_bytes().splitlines()[number - 1] for number in numbers] == lines[skip:]


@pytest.mark.parametrize("address", ["local", "auto", "10.0.0.1:6379", "[::1]:6379"])
def test_addresses_of_clusters_are_known(address: str) -> None:
    assert check_address(address) == address


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["batch", "--ray", "in.jsonl", "out.jsonl"], "'in.jsonl' is no address of a cluster"),
        (["batch", "in", "out", "--bundle", "b", "--ray", "ray://h:1"], "with --ray auto"),
        (["batch", "in", "out", "--bundle", "b", "--replicas", "2"], "--replicas: only with --ray"),
        (["batch", "in", "out", "--bundle", "b", "--ray", "--replicas", "1-2"], "'1-2' is no number of replicas"),
        (["serve", "b", "--ray", "auto", "--replicas", "3-2"], "'3-2' is no number of replicas: write 4, or 1-8"),
        (["serve", "b", "--ray", "auto", "--replicas", "0"], "'0' is no number of replicas"),
    ],
)
def test_wrong_options_are_refused(arguments: list[str], problem: str) -> None:
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 2 and problem in result.stderr


def test_a_port_in_use_is_refused_before_ray_starts(settings: Settings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as used:
        port = used.getsockname()[1]
        arguments = ["serve", f"tiny={settings.models['tiny']}", "--ray", "local", "--port"]
        result = CliRunner().invoke(cli, [*arguments, str(port)])
        assert result.exit_code == 1 and f"cannot listen on 127.0.0.1, port {port}" in result.stderr
    result = CliRunner().invoke(cli, [*arguments, "0"])
    assert result.exit_code == 1 and "--port 0: every machine" in result.stderr


def test_autoscaling_follows_the_slots(settings: Settings) -> None:
    config = deployment(settings, replicas=(1, 8))._bound_deployment._deployment_config
    assert (config.autoscaling_config.min_replicas, config.autoscaling_config.max_replicas) == (1, 8)
    assert config.autoscaling_config.target_ongoing_requests == settings.slots == 2
    assert config.max_ongoing_requests == 4
