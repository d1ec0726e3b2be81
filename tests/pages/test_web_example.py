"""Does a portable bundle run in a browser? Opens the page of examples/web in a headless Chromium.

Needs a Chromium (Debian: chromium-headless-shell) and npm's onnxruntime-web (`make node`).
"""

from __future__ import annotations

import functools
import http.server
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgelm.bundle import Bundle
from edgelm.export import ExportOptions, export_bundle
from edgelm.parity.golden import GoldenOptions
from edgelm.quant import PRESETS
from edgelm.runtimes import open_runtime
from edgelm.tokenization.tokenizer import Tokenizer

from .browser import Browser, find_browser

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "web"
MODULE = ROOT / "build" / "node" / "node_modules" / "onnxruntime-web"
TOKENS = 8
GENERATE = """(async () => {
  const { load, generate } = await import('./model.js');
  const steps = [];
  for await (const { token, logits } of generate(await load('%s'), %s, %d)) steps.push([token, Array.from(logits)]);
  return steps;
})()"""

SUBMIT = """(async () => {
  const form = document.querySelector('form');
  form.requestSubmit();
  while (form.querySelector('button').disabled) await new Promise(done => setTimeout(done, 20));
  return ['output', '.error'].map(name => document.querySelector(name)?.textContent ?? '');
})()"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Address and folder of the page, as `python -m http.server` serves it."""
    program = find_browser()
    problem = None if program else "there is no Chromium: apt-get install chromium-headless-shell"
    version = json.loads((EXAMPLE / "package.json").read_text())["dependencies"]["onnxruntime-web"]
    module = MODULE / "package.json"
    if not module.is_file() or json.loads(module.read_text())["version"] != version:
        problem = f"{MODULE} is not {version}: make node"
    if problem is not None:
        if os.environ.get("CI") == "true":
            pytest.fail(problem)
        pytest.skip(problem)
    folder = tmp_path_factory.mktemp("web") / "site"
    shutil.copytree(EXAMPLE, folder)
    (folder / "node_modules").mkdir()
    (folder / "node_modules" / "onnxruntime-web").symlink_to(MODULE)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", folder
        server.shutdown()


@pytest.fixture(scope="module")
def page(site: tuple[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find_browser()
    assert program is not None
    with Browser(program, tmp_path_factory.mktemp("profile")) as browser:
        browser.call("Page.navigate", url=site[0])
        assert result(
            browser, "document.readyState === 'complete' || new Promise(done => addEventListener('load', done))"
        )
        yield browser


def result(page: Browser, expression: str) -> Any:
    """Value that a promise in the page resolves to."""
    found = page.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
    if "exceptionDetails" in found:
        raise RuntimeError(found["exceptionDetails"]["exception"].get("description"))
    return found["result"].get("value", True)


def export(site: tuple[str, Path], name: str, recipe: str) -> Bundle:
    options = ExportOptions(ops="portable", golden=GoldenOptions(greedy_tokens=0, max_prompt_tokens=4))
    checkpoint = ROOT / "examples" / "checkpoints" / f"{name}-tiny"
    return export_bundle(checkpoint, site[1] / f"{name}-{recipe}", recipe=PRESETS[recipe], options=options)


@pytest.mark.parametrize(("name", "recipe", "tolerance"), [("fox", "int4", 2e-2), ("olmoe", "none", 1e-4)])
def test_a_browser_generates_what_python_generates(
    site: tuple[str, Path], page: Browser, name: str, recipe: str, tolerance: float
) -> None:
    bundle = export(site, name, recipe)
    prompt = Tokenizer.from_folder(bundle.path).encode("Once upon a time there was")
    steps = result(page, GENERATE % (bundle.path.name, prompt, TOKENS))
    assert len(steps) == TOKENS
    with open_runtime(bundle, threads=1) as runtime:
        logits = runtime.prefill(prompt)
        for token, row in steps:
            found = np.asarray(row, np.float32)
            assert np.linalg.norm(found - logits) < tolerance * np.linalg.norm(logits)
            assert token == int(logits.argmax())
            logits = runtime.decode(token)
    assert submit(page, bundle.path.name, prompt) == [str([token for token, _ in steps])[1:-1], ""]


def submit(page: Browser, bundle: str, prompt: list[int]) -> list[str]:
    """Fill in the form; return what the page shows when it is done: the tokens and, where it has failed, the error."""
    fields = {"bundle": bundle, "prompt": str(prompt)[1:-1], "count": TOKENS}
    result(
        page, f"Object.entries({json.dumps(fields)}).forEach(([k, v]) => document.querySelector('form')[k].value = v)"
    )
    shown: list[str] = result(page, SUBMIT)
    return shown


def test_what_cannot_run_is_told_on_the_page(site: tuple[str, Path], page: Browser) -> None:
    bundle = export(site, "olmoe", "int4")
    assert "which needs ONNX Runtime 1.31.0; here is 1.30" in submit(page, bundle.path.name, [5, 6])[1]
    assert "nowhere/manifest.json: 404" in submit(page, "nowhere", [5, 6])[1]
    other = export(site, "fox", "none").path.name
    assert "3072 is no token id: they are whole numbers below 3072" in submit(page, other, [5, 3072])[1]
    assert "510 prompt tokens and 8 more do not fit into 512 positions" in submit(page, other, [5] * 510)[1]
