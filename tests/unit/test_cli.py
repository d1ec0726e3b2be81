"""Do the verbs print the right output, report errors in one line, and end cleanly when interrupted?"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tiny_graph import Shape, write_tiny_model

import edgelm
from edgelm.cli.main import VERBS, cli
from edgelm.generation.language_model import load
from edgelm.installing import install_hint
from edgelm.runtimes.base import interruptible

PROMPT = "def main():"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "bundle", eos_ids=(2,)).path


def invoke(*arguments: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], input=stdin)


def spawn(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-m", "edgelm", *(str(argument) for argument in arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_help_lists_every_verb_and_imports_none() -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    assert all(verb in result.stdout for verb in VERBS)
    code = (
        "import sys; from click.testing import CliRunner; from edgelm.cli.main import cli; "
        "assert CliRunner().invoke(cli, ['--help']).exit_code == 0; "
        "loaded = [name for name in sys.modules if name.startswith('edgelm.cli.')]; "
        "assert sorted(loaded) == ['edgelm.cli.common', 'edgelm.cli.common.help', 'edgelm.cli.common.interrupts', "
        "'edgelm.cli.main'], loaded; "
        "assert 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_command_with_help(verb: str) -> None:
    result = invoke(verb, "--help")
    assert result.exit_code == 0, result.output
    assert f"edgelm {verb}" in result.stdout or f"cli {verb}" in result.stdout


def test_version() -> None:
    assert invoke("--version").stdout == f"edgelm {edgelm.__version__}\n"


def test_run_streams_the_text_to_stdout_and_speed_to_stderr(bundle: Path) -> None:
    with load(bundle, threads=1) as model:
        want = model.generate(PROMPT, max_tokens=12)
    result = invoke("run", bundle, PROMPT, "-n", 12, "--threads", 1)
    assert result.exit_code == 0
    assert result.stdout == want.text + "\n"
    assert "tokens/s" in result.stderr
    assert "ended by length" in result.stderr
    quiet = invoke("run", bundle, "-", "-n", 12, "--threads", 1, "-q", stdin=PROMPT)
    assert (quiet.stdout, quiet.stderr) == (want.text + "\n", "")


def test_run_json_is_one_document(bundle: Path) -> None:
    result = invoke("run", bundle, PROMPT, "-n", 5, "--json", "-t", 0.9, "--top-k", 20, "--seed", 3)
    document = json.loads(result.stdout)
    assert len(document["tokens"]) == 5
    assert document["stop_reason"] == "length"
    assert document["timings"]["decode_tokens_per_second"] > 0
    again = json.loads(invoke("run", bundle, PROMPT, "-n", 5, "--json", "-t", 0.9, "--top-k", 20, "--seed", 3).stdout)
    assert again["tokens"] == document["tokens"]


def test_run_chat_applies_the_template(bundle: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    with load(bundle, threads=1) as model:
        want = model.chat(messages, max_tokens=6)
    result = invoke("run", bundle, "Hi", "--chat", "--system", "Be brief.", "-n", 6, "--json", "--threads", 1)
    assert json.loads(result.stdout)["tokens"] == list(want.tokens)


def test_run_answers_a_conversation_from_a_file(bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    messages = [{"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "you"}]}]
    file.write_text(json.dumps(messages))
    with load(bundle, threads=1) as model:
        want = model.chat([{"role": "user", "content": "Hi\nyou"}], max_tokens=6)
        assert model.chat(messages, max_tokens=6).tokens == want.tokens
    result = invoke("run", bundle, "--messages", file, "-n", 6, "--json", "--threads", 1)
    assert json.loads(result.stdout)["tokens"] == list(want.tokens)
    for text, message in (
        ("[]", "messages must be a list such as"),
        ('{"role": "user"}', "messages must be a list such as"),
        ('[{"role": "user", "content": [{"type": "image"}]}]', "is of type 'image': models here read text only"),
        ("[", "not valid JSON"),
    ):
        file.write_text(text)
        result = invoke("run", bundle, "--messages", file)
        assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
        assert message in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["/nowhere/at/all", "x"], 1, "edgelm: error: /nowhere/at/all does not exist"),
        (["{bundle}", "x", "--runtime", "npu"], 2, "there is no runtime 'npu'; there are: onnxruntime-cpu"),
        (["{bundle}", "x", "--top-p", "0.5"], 2, "top_p would do nothing with temperature 0"),
        (["{bundle}", "x" * 3000, "--context-length", "16"], 1, "do not fit: the context holds 16"),
        (["{bundle}", "x" * 3000, "--context-length", "256"], 1, "Shorten the text: 256 is the model's own limit"),
        (["{bundle}", ""], 1, "the prompt is empty"),
        (["{bundle}"], 2, "Missing argument 'PROMPT'"),
        (["{bundle}", "x", "--top-p", "2"], 2, "2.0 is not in the range"),
        (["{bundle}", "x", "--system", "y"], 2, "--system needs --chat"),
        (["{bundle}", "x", "--messages", "y"], 2, "--messages is the whole conversation"),
        (["{bundle}", "--messages", "/nowhere/at/all"], 1, "/nowhere/at/all: is missing"),
        (["{bundle}", "x", "--bogus"], 2, "No such option"),
        (["{bundle}", "-p", "x"], 2, "No such option '-p': the prompt is the second argument"),
    ],
)
def test_errors_are_one_line_with_an_exit_code(bundle: Path, arguments: list[str], code: int, message: str) -> None:
    result = invoke("run", *(argument.replace("{bundle}", str(bundle)) for argument in arguments))
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    if code == 1:
        assert result.stderr.count("\n") == 1


class Panic(BaseException):
    """Not an Exception, like a panic of Rust."""


def deeper() -> None:
    deeper()


def raiser(error: BaseException) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("fail", "said"),
    [
        (
            raiser(ValueError("no\nsuch\x1b[31m thing")),
            "unexpected ValueError: no such\\x1b[31m thing; this is a bug: ",
        ),
        (raiser(AssertionError()), "unexpected AssertionError; this is a bug: "),
        (raiser(UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates")), "unexpected UnicodeEncodeError: "),
        (raiser(Panic("index out of bounds")), "unexpected Panic: index out of bounds; this is a bug: "),
        (lambda *_: deeper(), "unexpected RecursionError: "),
        (lambda *_: interruptible(raiser(KeyError("k")), lambda: None), "unexpected KeyError: 'k'; this is a bug: "),
        (raiser(ImportError("no libx.so", name="numpy")), "(ImportError: no libx.so): install it again"),
        (raiser(MemoryError()), "not enough memory"),
        (raiser(OSError(28, "No space left on device")), "[Errno 28] No space left on device"),
    ],
)
def test_an_unexpected_error_is_one_line_too(
    monkeypatch: pytest.MonkeyPatch, fail: Callable[..., None], said: str
) -> None:
    monkeypatch.setattr("edgelm.bundle.Bundle.open", fail)
    result = invoke("run", "bundle", "x")
    assert result.exit_code == 1
    assert result.stderr.startswith("edgelm: error: ")
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert ("`edgelm --debug VERB ...`" in result.stderr) == ("unexpected" in said)
    debugged = invoke("--debug", "run", "bundle", "x")
    assert debugged.exit_code == 1
    assert "Traceback (most recent call last)" in debugged.stderr
    assert debugged.stderr.endswith(result.stderr)


def test_a_bug_while_parsing_arguments_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("click.Context.__init__", raiser(TypeError("x")))
    result = invoke("run", "bundle", "x")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "unexpected TypeError: x; this is a bug" in result.stderr


def test_debug_shows_the_traceback() -> None:
    result = CliRunner().invoke(cli, ["--debug", "run", "/nowhere/at/all", "x"])
    process = spawn("--debug", "run", "/nowhere/at/all", "x")
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == result.exit_code == 1
    assert "Traceback" in stderr
    assert "edgelm: error: /nowhere/at/all does not exist" in stderr


def test_an_unknown_verb_is_wrong_usage() -> None:
    result = invoke("ran")
    assert result.exit_code == 2
    assert "no such command 'ran': did you mean 'run'?" in result.stderr


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that generates without end; the context lasts for a minute."""
    shape = Shape(vocab=512, hidden=64, layers=8, context=1 << 16)
    return write_tiny_model(tmp_path_factory.mktemp("endless") / "bundle", shape).path


@pytest.fixture
def generating(endless: Path) -> Iterator[subprocess.Popen[str]]:
    """A process of `edgelm run` that has printed some text."""
    process = spawn("run", endless, PROMPT, "-n", 60000, "--context-length", 65000, "--threads", 1)
    assert process.stdout is not None
    assert len(process.stdout.read(40)) == 40
    yield process
    process.kill()
    process.wait()


@pytest.mark.skipif(os.name == "nt", reason="no POSIX signals")
@pytest.mark.parametrize(("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_a_signal_stops_run_with_the_speed_and_status_130(
    generating: subprocess.Popen[str], number: signal.Signals, word: str
) -> None:
    generating.send_signal(number)
    started = time.perf_counter()
    _, stderr = generating.communicate(timeout=60)
    assert time.perf_counter() - started < 10
    assert generating.returncode == 130
    assert "ended by interrupted" in stderr
    assert "tokens/s" in stderr
    assert word in stderr
    assert "Traceback" not in stderr


@pytest.mark.skipif(os.name == "nt", reason="no POSIX pipes")
def test_a_closed_pipe_ends_run_without_an_error(generating: subprocess.Popen[str]) -> None:
    assert generating.stdout is not None
    generating.stdout.close()
    generating.stdout = None
    stderr = generating.communicate(timeout=60)[1]
    assert generating.returncode in (0, 1)
    assert "Traceback" not in stderr
    assert "Exception" not in stderr


def test_inspect_describes_and_verifies_a_bundle(bundle: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    document = json.loads(invoke("inspect", copy, "--json").stdout)
    assert (document["kind"], document["model"]["vocab_size"], document["problems"]) == ("bundle", 512, None)
    assert "tiny-graph" in invoke("inspect", copy).stdout
    intact = invoke("inspect", copy, "--verify")
    assert intact.exit_code == 0
    assert "every file is what was exported" in intact.stdout
    graph = copy / "config.json"
    graph.write_bytes(graph.read_bytes().replace(b"512", b"513"))
    damaged = invoke("inspect", copy, "--verify")
    assert damaged.exit_code == 1
    assert "config.json: contents differ" in damaged.stdout
    assert json.loads(invoke("inspect", copy, "--verify", "--json").stdout)["problems"]


def test_inspect_describes_the_calibration() -> None:
    from edgelm.bundle import CalibrationInfo, ExpertFallback
    from edgelm.cli.inspect import calibration_line

    assert "rounded to nearest" in calibration_line(None)
    info = CalibrationInfo("mine.txt", "0123456789abcdef" * 4, 128, 512, {"gptq": 9, "rtn": 1})
    line = calibration_line(info)
    assert "128 x 512 tokens of mine.txt (SHA-256 0123456789ab)" in line
    assert "9 gptq, 1 rtn" in line
    assert "too few" not in line
    starved = dataclasses.replace(info, fallbacks=(ExpertFallback(3, 17, 5),), smoothing="weights")
    assert "smoothed for weights" in calibration_line(starved)
    assert "3.17 (5)" in calibration_line(starved)


def test_inspect_of_another_folder_fails(tmp_path: Path) -> None:
    result = invoke("inspect", tmp_path)
    assert result.exit_code == 1
    assert "is neither a bundle nor a checkpoint" in result.stderr


def test_inspect_describes_a_checkpoint(tmp_path: Path) -> None:
    checkpoint = write_fox(tmp_path / "checkpoint")
    result = invoke("inspect", checkpoint)
    assert result.exit_code == 0, result.output
    assert "LlamaForCausalLM" in result.stdout
    document = json.loads(invoke("inspect", checkpoint, "--json").stdout)
    assert (document["kind"], document["dtypes"]["BF16"], document["quantized"]) == (
        "checkpoint",
        document["tensors"],
        False,
    )
    assert invoke("inspect", checkpoint, "--verify").exit_code == 2


def write_fox(path: Path) -> Path:
    pytest.importorskip("torch")
    from edgelm.synth import write_random_checkpoint

    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return write_random_checkpoint(config, path)


@pytest.fixture
def operators(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The compiled operators, which choose the instruction set."""
    from edgelm.runtimes.onnxruntime.native_library import library_path

    monkeypatch.delenv("EDGELM_ISA", raising=False)
    path = library_path()
    if path is None:
        pytest.skip("this installation has no compiled operators")
    return path


def test_inspect_cpu_says_which_kernels_run_and_why(operators: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = json.loads(invoke("inspect", "--cpu", "--json").stdout)
    states = {isa["name"]: isa["available"] for isa in document["instruction_sets"]}
    assert (document["kind"], document["library"], document["forced"]) == ("cpu", str(operators), False)
    assert document["chosen"] == next(name for name, available in states.items() if available)
    assert all((isa["missing"] is None) == isa["available"] for isa in document["instruction_sets"])
    text = invoke("inspect", "--cpu")
    assert text.exit_code == 0
    assert "the best that this CPU has" in text.stdout
    assert all(name in text.stdout for name in states)
    monkeypatch.setenv("EDGELM_ISA", "scalar")
    assert "scalar: EDGELM_ISA asks for it" in invoke("inspect", "--cpu").stdout
    assert json.loads(invoke("inspect", "--cpu", "--json").stdout)["chosen"] == "scalar"
    assert "compiled, scalar: EDGELM_ISA asks for it" in invoke("doctor").stdout


def test_inspect_cpu_refuses_an_unsupported_instruction_set(operators: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = json.loads(invoke("inspect", "--cpu", "--json").stdout)["instruction_sets"]
    absent = [isa["name"] for isa in found if not isa["available"]]
    for name in ("avx9", "AVX2", *absent):
        monkeypatch.setenv("EDGELM_ISA", name)
        result = invoke("inspect", "--cpu")
        assert result.exit_code == 1
        assert f"EDGELM_ISA={name}: " in result.stdout
        assert "scalar, or unset it for the best" in result.stdout
        assert json.loads(invoke("inspect", "--cpu", "--json").stdout)["chosen"] is None


def test_inspect_cpu_without_the_library_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGELM_OPS_LIBRARY", "")
    result = invoke("inspect", "--cpu")
    assert result.exit_code == 0
    assert "no compiled operators: bundles with portable operators run, native ones do not" in result.stdout
    document = json.loads(invoke("inspect", "--cpu", "--json").stdout)
    assert (document["library"], document["chosen"], document["instruction_sets"]) == (None, None, [])
    assert "no compiled operators" in invoke("doctor").stdout


def test_a_library_that_cannot_be_loaded_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    for path, wanted in ((broken, "install edgelm again"), (tmp_path / "none.so", "the file does not exist")):
        monkeypatch.setenv("EDGELM_OPS_LIBRARY", str(path))
        result = invoke("inspect", "--cpu")
        assert result.exit_code == 1
        assert str(path) in result.stderr
        assert wanted in result.stderr
        assert wanted in invoke("doctor").stdout


def test_inspect_takes_a_path_or_cpu(tmp_path: Path) -> None:
    for arguments in ((), (tmp_path, "--cpu"), ("--cpu", "--verify")):
        assert invoke("inspect", *arguments).exit_code == 2


def test_doctor_describes_this_machine() -> None:
    document = json.loads(invoke("doctor", "--json").stdout)
    assert document["edgelm"] == edgelm.__version__
    assert document["runtimes"]["onnxruntime-cpu"]["available"] is True
    assert document["device"]["allowed_cores"] >= 1
    assert document["packages"]["numpy"]
    assert "safetensors" not in document["packages"]
    assert document["disk"]["free"] <= document["disk"]["total"] == shutil.disk_usage(".").total
    # EdgeLM's own kernels have no package and so no version.
    assert document["runtimes"]["cuda-kernels"]["version"] is None
    assert document["runtimes"]["onnxruntime-cpu"]["version"] == document["runtimes"]["onnxruntime-cuda"]["version"]
    text = invoke("doctor")
    assert text.exit_code == 0
    first, *titles = [line for line in text.stdout.splitlines() if line and not line.startswith(" ")]
    assert first.startswith("EdgeLM can run bundles for cpu here")
    assert titles == ["What EdgeLM can do here", "This machine", "Runtimes"]
    more = invoke("doctor", "--verbose").stdout
    assert "\nPackages\n" in more
    assert re.search(r"^  GPU kernels +\S", more, re.MULTILINE)
    assert re.search(r"^  run +bundles for cpu with onnxruntime-cpu", text.stdout, re.MULTILINE)
    assert (
        len({re.match(r"  \S(?:\S| (?! ))* *", line).end() for line in text.stdout.splitlines() if line[:1] == " "})
        == 1
    )


def test_doctor_says_how_to_install_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    real = importlib.util.find_spec
    gone = {"onnxruntime", "tensorrt", "tensorrt_rtx", "torch", "onnx"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in gone else real(name, *rest))
    result = invoke("doctor")
    assert result.exit_code == 1
    assert f"missing: {install_hint('cpu')}" in result.stdout
    assert result.stdout.startswith("EdgeLM cannot run any bundle here: no runtime can be used.\n")
    assert "nothing: no runtime can be used" in result.stdout
    assert f"missing torch, onnx (only needed to export): {install_hint('export')}" in result.stdout


def test_doctor_describes_the_gpus_and_their_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGELM_CUDA_DRIVER", str(tmp_path / "libcuda.so.1"))
    monkeypatch.setenv("EDGELM_NVRTC", str(tmp_path / "libnvrtc.so.13"))
    document = json.loads(invoke("doctor", "--json").stdout)
    assert document["gpu"]["devices"] == [] and not document["gpu_compiler"]["libraries"]
    text = invoke("doctor")
    assert text.exit_code == 0
    assert re.search(r"^  GPU +none: no NVIDIA driver", text.stdout, re.MULTILINE)
    assert re.search(r"^  tensorrt +ready, \S+, but there is no GPU", text.stdout, re.MULTILINE)
    assert f"cannot be exported: EDGELM_NVRTC={tmp_path}" in invoke("doctor", "-v").stdout

    source = Path(__file__).parents[1] / "cuda" / "fake_driver.c"
    driver = tmp_path / "driver.so"
    subprocess.run([os.environ.get("CC", "cc"), "-std=gnu11", "-shared", "-fPIC", source, "-o", driver], check=True)
    monkeypatch.setenv("EDGELM_CUDA_DRIVER", str(driver))
    monkeypatch.setenv("FAKE_CUDA_DEVICES", "2")
    monkeypatch.delenv("EDGELM_NVRTC")
    document = json.loads(invoke("doctor", "--json").stdout)
    assert [device["name"] for device in document["gpu"]["devices"]] == ["Fake GPU 0", "Fake GPU 1"]
    assert document["gpu_compiler"]["lacking"] == []
    assert [one["version"] for one in document["gpu_compiler"]["libraries"].values()] == ["12.6", "13.0"]
    text = invoke("doctor")
    assert re.search(r"^  GPU +Fake GPU 1, SM 86, 1.07 GB, driver for CUDA 13.0", text.stdout, re.MULTILINE)
    assert re.search(
        r"^  GPU kernels +compiled by NVRTC 12.6 for sm_80, .*; NVRTC 13.0 for sm_100, sm_110",
        text.stdout,
        re.MULTILINE,
    )
    assert "but there is no GPU" not in text.stdout


def test_a_run_only_install_runs_measures_and_inspects(bundle: Path) -> None:
    code = f"""
import sys
for name in ("torch", "onnx", "safetensors", "huggingface_hub", "transformers", "ml_dtypes", "onnx_ir"):
    sys.modules[name] = None  # importing it now raises ImportError
from click.testing import CliRunner
from edgelm.cli.main import cli
for arguments in (
    ["run", {str(bundle)!r}, "x", "-n", "2", "--chat", "-t", "1"],
    ["bench", {str(bundle)!r}, "--prompt-tokens", "4", "--new-tokens", "2", "--repeat", "1"],
    ["inspect", {str(bundle)!r}, "--verify"],
    ["doctor"],
    ["parity", "--help"],
):
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, (arguments, result.output, result.exception)
"""
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


def test_making_a_bundle_in_a_run_only_install_says_what_to_install(tmp_path: Path) -> None:
    code = f"""
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torch" else real(name, *rest)
from click.testing import CliRunner
from edgelm.cli.main import cli
for arguments in (["export", "x", "-o", {str(tmp_path / "out")!r}], ["demo"]):
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 1, (result.output, result.exception)
    assert "needs torch" in result.stderr and {install_hint("export")!r} in result.stderr, result.stderr
"""
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


@pytest.mark.parametrize(("terminal", "shown"), [(True, "a\u241b[31mb\n"), (False, "a\x1b[31mb\n")])
def test_control_characters_of_an_answer_reach_files_but_no_terminal(
    terminal: bool, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgelm.cli.common.output import write_answer

    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal)
    monkeypatch.setattr("sys.stdout", stream)
    write_answer("a\x1b[31mb\n")
    assert stream.getvalue() == shown


def test_a_wrong_recipe_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('default = "int4-g32-sym"\n[[rule]]\nrole = "routr"\nscheme = "float"\n')
    code = f"""
import sys
from edgelm.cli.main import cli
try:
    cli(["export", "x", "-o", "y", "--recipe", {str(recipe)!r}])
except SystemExit:
    print("torch" in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "is not one of" in result.stderr
    assert result.stdout == "False\n"


def test_without_a_driver_export_says_that_there_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgelm.cli.export import _has_gpu

    monkeypatch.setenv("EDGELM_CUDA_DRIVER", str(tmp_path / "libcuda.so.1"))
    assert not _has_gpu()
