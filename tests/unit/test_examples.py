"""Do the examples in examples/ work?"""

from __future__ import annotations

import http.client
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_graph import Shape, write_tiny_model

from edgelm.bundle import Bundle
from edgelm.checkpoint import Checkpoint
from edgelm.corpus import standard_library
from edgelm.generation.language_model import load
from edgelm.quant import Recipe

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "bundle", Shape(vocab=512, context=4096)).path


@pytest.fixture(scope="module")
def port(bundle: Path) -> Iterator[int]:
    command = [sys.executable, "-P", str(EXAMPLES / "embed.py"), str(bundle), "--port", "0", "--threads", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("listening on")
    yield int(line.rpartition(":")[2])
    process.terminate()
    process.communicate()  # closes the pipe


def post(port: int, **request: object) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/complete", json.dumps(request))
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, text


def test_the_service_returns_the_generated_text(port: int, bundle: Path) -> None:
    with load(bundle, threads=1) as model:
        assert post(port, prompt="hello", max_tokens=8) == (200, model.generate("hello", max_tokens=8).text)
        messages = [{"role": "user", "content": "Hi"}]
        assert post(port, messages=messages, max_tokens=8) == (200, model.chat(messages, max_tokens=8).text)


def test_a_client_that_disconnects_does_not_block_the_next(port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/complete", json.dumps({"prompt": "hello", "max_tokens": 4000}))
    assert connection.getresponse().read(1)
    connection.close()
    assert post(port, prompt="hello", max_tokens=2)[0] == 200


@pytest.mark.parametrize("request_", [{"prompt": "x", "temperature": -1}, {}, {"prompt": "x" * 50_000}])
def test_unusable_requests_are_refused_with_a_reason(port: int, request_: dict[str, object]) -> None:
    status, text = post(port, **request_)
    assert status == 400
    assert any(word in text for word in ("temperature", "prompt", "do not fit"))


def test_the_calibration_example_runs_completely(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(standard_library()[0][5:200:20])[:60_000], encoding="utf-8")
    command = [sys.executable, "-P", str(EXAMPLES / "calibrate.py"), str(EXAMPLES / "checkpoints" / "olmoe-tiny")]
    command += [
        str(tmp_path / "out"),
        "--bits",
        "4.5",
        "--text",
        str(text),
        "--samples",
        "8",
        "--length",
        "128",
        "--threads",
        "1",
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "bits per weight, expected KL" in done.stdout
    kl = float(done.stdout.rpartition("KL ")[2].split()[0])
    assert 0 < kl < 0.02  # for comparison: int4 rounded to nearest has 0.0155, at half a bit more
    assert Recipe.load(tmp_path / "out" / "recipe.toml").rules
    assert Bundle.open(tmp_path / "out" / "bundle").manifest.calibration is not None


def test_the_training_script_writes_a_checkpoint_and_goes_on_from_it(tmp_path: Path) -> None:
    out = tmp_path / "fox-tiny"
    command = [sys.executable, "-P", str(EXAMPLES / "checkpoints" / "train.py"), "fox-tiny", "-o", str(out)]
    command += ["--every", "30", "--steps"]
    subprocess.run([*command, "2"], check=True, capture_output=True)
    first = (out / "model.safetensors").read_bytes()
    done = subprocess.run([*command, "1", "--resume"], check=True, capture_output=True, text=True)
    assert [phase["steps"] for phase in json.loads((out / "training.json").read_text())] == [2, 1]
    assert (out / "model.safetensors").read_bytes() != first
    nats, unigram = (float(done.stdout.partition(f"{name}=")[2].partition(",")[0]) for name in ("nats", "unigram_nats"))
    assert unigram < nats < math.log(3072)  # after three steps it knows a little: less than a count of tokens does
    assert Checkpoint.open(out).config["vocab_size"] == 3072


def test_every_example_is_listed() -> None:
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    files = [path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".js")]
    assert files
    assert [name for name in files if f"]({name})" not in page] == []
