"""Does `edgelm run --prompt-cache` begin where an earlier run was, and say what is wrong with its file?"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from tiny_graph import Shape, write_tiny_model

from edgelm.cli.main import cli
from edgelm.generation.language_model import load
from edgelm.runtimes.onnxruntime.portable import PortableRuntime

PROMPT = "def main():\n    return"
LONGER = PROMPT + " value + 1"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "bundle", eos_ids=(2,)).path


def run(bundle: Path, prompt: str, file: Path, *arguments: object, verb: str = "run") -> Result:
    command = [verb, bundle, prompt, "-n", 8, "--threads", 1, "--prompt-cache", file, *arguments]
    return CliRunner().invoke(cli, [str(argument) for argument in command])


def reused(result: Result) -> int:
    assert result.exit_code == 0, result.output
    return int(json.loads(result.stdout)["timings"]["reused_tokens"])


def test_a_longer_prompt_computes_only_the_rest(bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "cache"
    with load(bundle, threads=1) as model:
        first, longer = (len(model.tokenizer.encode(prompt)) for prompt in (PROMPT, LONGER))
        want = [model.generate(prompt, max_tokens=8).text + "\n" for prompt in (PROMPT, LONGER)]
    cold = run(bundle, PROMPT, file)
    assert cold.stdout == want[0]
    assert "cached" not in cold.stderr
    assert f"[{first} tokens saved in {file}: " in cold.stderr
    warm = run(bundle, LONGER, file)
    assert warm.stdout == want[1]
    assert f"[{first} tokens loaded from {file} in 0." in warm.stderr
    assert f"[{longer} prompt tokens ({first} cached) at " in warm.stderr
    assert f"[{longer} tokens saved in {file}: " in warm.stderr
    assert reused(run(bundle, LONGER, file, "--json")) == longer


def test_a_prompt_that_the_file_has_is_not_saved_again(bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "cache"
    run(bundle, LONGER, file)
    before = file.read_bytes()
    file.touch()
    changed = file.stat().st_mtime_ns
    for prompt in (LONGER, PROMPT):
        again = run(bundle, prompt, file)
        assert "cached" in again.stderr
        assert "saved" not in again.stderr
    assert (file.read_bytes(), file.stat().st_mtime_ns) == (before, changed)


def test_the_answer_is_saved_only_with_prompt_cache_all(bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "cache"
    with load(bundle, threads=1) as model:
        count, answer = len(model.tokenizer.encode(PROMPT)), model.generate(PROMPT, max_tokens=8)
        for arguments, kept in (((), count), (("--prompt-cache-all",), count + 7)):
            run(bundle, PROMPT, file, *arguments)
            assert model.load_session(file) == kept
        # The file has the answer: a run of the same prompt leaves it there.
        run(bundle, PROMPT, file)
        assert model.load_session(file) == count + 7
        assert model.cache.cached[count:] == list(answer.tokens[:7])


def test_quiet_prints_the_text_alone(bundle: Path, tmp_path: Path) -> None:
    for _ in range(2):
        result = run(bundle, PROMPT, tmp_path / "cache", "-q")
        assert (result.exit_code, result.stderr) == (0, "")
    assert (tmp_path / "cache").exists()


def test_a_seed_gives_the_same_text_with_and_without_the_file(bundle: Path, tmp_path: Path) -> None:
    file, sampling = tmp_path / "cache", ("-t", 1.5, "--seed", 3)
    want = run(bundle, LONGER, tmp_path / "other", *sampling).stdout
    run(bundle, PROMPT, file)
    found = run(bundle, LONGER, file, *sampling)
    assert found.stdout == want
    with load(bundle, threads=1) as model:
        count = len(model.tokenizer.encode(PROMPT))
    said = f"[--seed: of {count} tokens in {file}, 0 were reused: only whole steps of 256 tokens give the same text as"
    assert said in found.stderr
    # It was computed afresh and saved, so the identical prompt is reused.
    again = run(bundle, LONGER, file, *sampling)
    assert again.stdout == want
    assert "cached" in again.stderr
    assert "--seed" not in again.stderr


def test_a_file_with_other_bits_is_computed_and_saved_again_for_a_seed(bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "cache"
    for prompt in (PROMPT, LONGER):
        run(bundle, prompt, file)  # the second prompt is computed behind the first one
    assert reused(run(bundle, LONGER, file, "--json", "-t", 1, "--seed", 1)) == 0
    assert reused(run(bundle, LONGER, file, "--json", "-t", 1, "--seed", 1)) > 10


def test_conversations_are_cached_too(bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "cache"
    talk = ("--chat", "--system", "Be brief, and answer in code.", "--json")
    assert reused(run(bundle, "Hi", file, *talk)) == 0
    assert reused(run(bundle, "How are you?", file, *talk)) > 10


def test_a_chat_begins_where_an_earlier_one_was(bundle: Path, tmp_path: Path) -> None:
    command = ["chat", bundle, "-n", 5, "-t", 0, "--threads", 1, "--prompt-cache", tmp_path / "cache"]
    texts = []
    for cached in (False, True):
        result = CliRunner().invoke(cli, [str(argument) for argument in command], input="Hello there\n")
        assert result.exit_code == 0, result.output
        assert ("cached" in result.stderr) == cached
        texts.append(result.stdout)
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("contents", "said"),
    [
        (b"", "cache: this session file is cut off: save the session again; or give another file to --prompt-cache"),
        (b"EDGELMKV", "cache: this session file is cut off: save the session again; or give another file to"),
        (b"my novel", "cache exists already and is not a session that EdgeLM saved: choose another place"),
    ],
)
def test_another_file_is_refused_and_unchanged(bundle: Path, tmp_path: Path, contents: bytes, said: str) -> None:
    file = tmp_path / "cache"
    file.write_bytes(contents)
    result = run(bundle, PROMPT, file)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert said in result.stderr
    assert file.read_bytes() == contents


def test_a_file_of_another_bundle_or_context_is_refused_and_unchanged(bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "cache"
    other = write_tiny_model(tmp_path / "other", seed=1, eos_ids=(2,)).path
    run(other, PROMPT, file)
    before = file.read_bytes()
    advice = "or give another file to --prompt-cache, or delete this one"
    for arguments, said in (
        ((bundle, PROMPT, file), "cache: this session belongs to another bundle: open that one, or save the session"),
        ((other, "x", file, "--context-length", 9), "tokens do not fit: the context holds 9"),
    ):
        result = run(*arguments)
        assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1)
        assert said in result.stderr
        assert advice in result.stderr
    assert file.read_bytes() == before


def test_places_where_no_file_can_be_are_refused_before_the_model_is_loaded(bundle: Path, tmp_path: Path) -> None:
    for path, said in (
        (tmp_path, "is a folder, but a session is a file"),
        (tmp_path / "missing" / "cache", "there is no folder"),
        (bundle / "cache", f"lies in the input {bundle}"),
    ):
        result = run(bundle, PROMPT, path)
        assert (result.exit_code, result.stdout) == (1, "")
        assert said in result.stderr


def test_prompt_cache_all_alone_is_wrong_usage(bundle: Path) -> None:
    result = CliRunner().invoke(cli, ["run", str(bundle), "x", "--prompt-cache-all"])
    assert result.exit_code == 2
    assert "--prompt-cache-all needs --prompt-cache FILE" in result.stderr


def test_the_text_is_complete_if_the_file_cannot_be_written(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = run(bundle, PROMPT, tmp_path / "cache").stdout

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PortableRuntime, "_saved", fail)
    result = run(bundle, PROMPT, tmp_path / "full")
    assert (result.exit_code, result.stdout) == (1, want)
    assert f"the disk is full while writing {tmp_path / 'full'}" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_a_prompt_that_fails_is_not_saved(bundle: Path, tmp_path: Path) -> None:
    assert run(bundle, "x" * 3000, tmp_path / "cache").exit_code == 1
    assert not (tmp_path / "cache").exists()


@pytest.mark.skipif(os.name == "nt", reason="no POSIX signals")
def test_ctrl_c_in_the_answer_keeps_the_prompt(tmp_path: Path) -> None:
    shape = Shape(vocab=512, hidden=64, layers=8, context=1 << 16)
    endless = write_tiny_model(tmp_path / "bundle", shape).path
    command = ["run", endless, PROMPT, "-n", 60000, "--context-length", 65000, "--prompt-cache", tmp_path / "cache"]
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "edgelm", *(str(argument) for argument in command)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.read(40)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "tokens saved in" in stderr
    assert "Traceback" not in stderr
    with load(endless, threads=1) as model:
        assert model.load_session(tmp_path / "cache") == len(model.tokenizer.encode(PROMPT))
