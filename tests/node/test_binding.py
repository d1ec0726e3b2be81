"""Does examples/node give Python's tokens through the C library, and leave Node's event loop free?"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgelm

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "node"
MODULES = ROOT / "build" / "node" / "node_modules"
LIBRARY = Path(os.environ.get("EDGELM_LIBRARY", ROOT / "build" / "csrc" / "libedgelm.so"))
PROMPT = "import os\n\n\ndef read(path):\n    with open("
MESSAGES = [{"role": "user", "content": 'Say "é漢🙂"'}]
SAMPLED: dict[str, Any] = {"temperature": 0.8, "topK": 40, "topP": 0.9, "seed": 2**64 - 1, "repetitionPenalty": 1.1}
SCRIPT = """
import { Model } from './edgelm.js';
const [bundle, given] = process.argv.slice(2);
const { prompt, messages, sampled, stop } = JSON.parse(given);
const model = await Model.open(bundle, { threads: 2 });
const shown = { info: model.info, ids: model.tokenize(prompt), text: model.detokenize(model.tokenize(prompt, false)) };

const parts = [];
let ticks = 0;
const ticking = setInterval(() => ticks++, 0);
for await (const part of model.stream(prompt, { maxTokens: 64 })) parts.push(part);
clearInterval(ticking);
Object.assign(shown, { parts, ticks });

const options = { maxTokens: 24 };
// Both at once: the second waits for the first.
[shown.greedy, shown.chat] = await Promise.all([model.generate(prompt, options), model.generate(messages, options)]);
shown.logits = Buffer.from((await model.logits(shown.ids, shown.ids.length)).buffer).toString('base64');
shown.ofIds = await model.generate(shown.ids, options);
shown.sampled = await model.generate(prompt, { ...options, ...sampled, seed: BigInt(sampled.seed) });
shown.stopped = await model.generate(prompt, { ...options, stop });

// Leaving a loop, and a signal, end a generation; the model is free then.
let left = '';
for await (const part of model.stream(prompt, { maxTokens: null })) {
  left += part;
  if (left.length > 5) break;
}
const abort = new AbortController();
const stream = model.stream(prompt, { maxTokens: null, signal: abort.signal });
await stream.next();
abort.abort();
let step = await stream.next();
while (!step.done) step = await stream.next();
shown.aborted = step.value.reason;
shown.early = (await model.generate(prompt, { ...options, signal: AbortSignal.abort() })).reason;
shown.again = await model.generate(prompt, options);

const failure = async (run) => {
  try {
    await run();
  } catch (error) {
    return { name: error.name, code: error.code, message: error.message };
  }
};
shown.failures = [
  await failure(() => model.generate(prompt, { temprature: 1 })),
  await failure(() => model.generate(prompt, { temperature: -1 })),
  await failure(() => model.generate([5, 'x'])),
  await failure(() => model.generate([1 << 30])),
  await failure(() => Model.open(`${bundle}/nowhere`)),
];
await model.close();
shown.failures.push(await failure(() => model.generate(prompt)), await failure(() => model.logits([5])));
// A call that waits for its turn while the model is closed fails, and so does the next one: none waits forever.
const other = await Model.open(bundle, { threads: 2 });
const closing = other.close();
const waiting = [other.generate([5]), other.generate([5])];
await closing;
shown.late = await Promise.all(waiting.map((one) => failure(() => one)));
console.log(JSON.stringify(shown, (_, value) => (typeof value === 'bigint' ? String(value) : value)));
"""


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example in a folder of its own, with koffi installed."""
    version = json.loads((EXAMPLE / "package.json").read_text())["dependencies"]["koffi"]
    module, problem = MODULES / "koffi" / "package.json", None
    if shutil.which("node") is None:
        problem = "there is no node"
    elif not module.is_file() or json.loads(module.read_text())["version"] != version:
        problem = f"{module.parent} is not {version}: make node"
    if problem is not None:
        if os.environ.get("CI") == "true":
            pytest.fail(problem)
        pytest.skip(problem)
    assert LIBRARY.exists(), f"{LIBRARY} is missing: make kernel"
    folder = tmp_path_factory.mktemp("app") / "app"
    shutil.copytree(EXAMPLE, folder)
    (folder / "node_modules").symlink_to(MODULES)
    (folder / "test.js").write_text(SCRIPT)
    return folder


def node(
    app: Path, script: str, *arguments: object, status: int = 0, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    import onnxruntime

    (runtime,) = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*")
    environment = {**os.environ, "EDGELM_LIBRARY": str(LIBRARY), "EDGELM_ONNXRUNTIME": str(runtime)}
    command = ["node", str(app / script), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, input=stdin, timeout=300, env=environment)
    assert result.returncode == status, result.stderr or result.stdout
    return result


@pytest.mark.parametrize("name", ["olmoe", "fox"])
def test_node_gives_the_tokens_of_python(app: Path, name: str, tiny_bundle: Callable[[str, str, str], Path]) -> None:
    bundle = tiny_bundle(name, "int4", "native")
    with edgelm.load(bundle, threads=2) as model:
        long = model.generate(PROMPT, max_tokens=64)
        greedy, chat = model.generate(PROMPT, max_tokens=24), model.chat(MESSAGES, max_tokens=24)
        options = {
            re.sub("([A-Z])", lambda found: f"_{found[1].lower()}", key): value for key, value in SAMPLED.items()
        }
        sampled = model.generate(PROMPT, max_tokens=24, **options)
        stop = greedy.text[len(greedy.text) // 2 :][:3]
        ids, vocabulary = model.tokenizer.encode(PROMPT), model.bundle.manifest.model.vocab_size
        model.runtime.reset()
        logits = np.concatenate([block.copy() for block in model.runtime.logits_all(ids)])
    given = {"prompt": PROMPT, "messages": MESSAGES, "sampled": {**SAMPLED, "seed": str(SAMPLED["seed"])}, "stop": stop}
    shown = json.loads(node(app, "test.js", bundle, json.dumps(given)).stdout)
    assert (shown["ids"], shown["text"]) == (ids, PROMPT)
    assert shown["info"]["vocabSize"] == vocabulary and shown["info"]["hasChatTemplate"] is True
    assert base64.b64decode(shown["logits"]) == logits.tobytes()
    assert "".join(shown["parts"]) == long.text and len(shown["parts"]) > 10
    assert shown["ticks"] > 5  # the event loop went on
    for key, expected in (
        ("greedy", greedy),
        ("chat", chat),
        ("ofIds", greedy),
        ("sampled", sampled),
        ("again", greedy),
    ):
        assert shown[key]["tokens"] == list(expected.tokens), key
        assert (shown[key]["text"], shown[key]["reason"]) == (expected.text, expected.stop_reason), key
    assert shown["stopped"]["text"] == greedy.text[: greedy.text.index(stop)] and shown["stopped"]["reason"] == "stop"
    assert shown["aborted"] == shown["early"] == "interrupted"
    unknown, negative, word, large, nowhere, closed, without = shown["failures"]
    assert "there is no option temprature; there are: maxTokens" in unknown["message"]
    assert negative["name"] == "EdgeLMError" and negative["code"] == 1 and "temperature" in negative["message"]
    assert word["message"] == "x is no token id"
    assert large["code"] == 1
    assert nowhere["code"] == 2 and "does not exist" in nowhere["message"]
    assert [one["message"] for one in (closed, without, *shown["late"])] == ["the model is closed"] * 4


def test_the_chat_answers_and_tells_errors(app: Path, tiny_bundle: Callable[[str, str, str], Path]) -> None:
    bundle = tiny_bundle("fox", "int4", "native")
    with edgelm.load(bundle, threads=2, chat=False) as model:
        assert node(app, "chat.js", bundle, PROMPT, 20).stdout == model.generate(PROMPT, max_tokens=20).text + "\n"
    result = node(app, "chat.js", bundle, stdin="def read\n\n")
    assert result.stderr.count("> ") == 2 and result.stdout.count("\n") >= 1
    told = node(app, "chat.js", app / "nowhere", "x", status=1).stderr
    assert told.startswith("error: ") and "does not exist" in told and len(told.splitlines()) == 1
    node(app, "chat.js", status=2)


def test_the_types_name_what_there_is() -> None:
    types, code = ((EXAMPLE / f"edgelm.{ending}").read_text() for ending in ("d.ts", "js"))
    declared = re.search(r"export class Model \{(.*?)\n\}", types, re.DOTALL)
    written = re.search(r"export class Model \{(.*?)\n\}", code, re.DOTALL)
    assert declared is not None and written is not None
    pattern = r"^  (?:static )?(?:async )?\*?(\w+)\("
    assert set(re.findall(pattern, declared[1], re.MULTILINE)) == set(re.findall(pattern, written[1], re.MULTILINE)) - {
        "constructor"
    }
    options = re.search(r"export interface GenerateOptions \{(.*?)\n\}", types, re.DOTALL)
    assert options is not None
    known = re.search(r"known = \[(.*?)\]", code)
    assert known is not None
    assert set(re.findall(r"^  (\w+)\?:", options[1], re.MULTILINE)) == {
        *re.findall(r"\w+", known[1]),
        "reuse",
        "signal",
    }
