"""Does wrong usage of every verb exit with 2 and say what is wrong, before anything is written?"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from edgelm import devices
from edgelm.cli.common.output import echo
from edgelm.cli.main import ALIASES, VERBS, cli

# Options whose value is free text: only a file, a model or the hub shows what is wrong with it.
FREE = {
    *("calibration", "checkpoint", "checkpoints", "messages", "out", "parity_prompts", "reference", "report_path"),
    *("base", "dist", "names", "prompt_cache", "stop", "system", "text", "wheels"),
    *("allow_host", "allow_origin", "api_key_file", "bundles", "cache_dir"),
}
# Options with a check of their own, tested by the table below; --ray in tests/serving/test_ray.py.
OWN = {"address", "schemes"}
NO_VALUE = ("nonsense", "-7", "")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty working folder, which stays empty."""
    monkeypatch.chdir(tmp_path)
    yield
    assert os.listdir(tmp_path) == []  # noqa: PTH208 - names alone


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def command_of(verb: str) -> click.Command:
    found = cli.get_command(click.Context(cli), verb)
    assert found is not None
    return found


def least_arguments(verb: str) -> list[str]:
    """Values for what a verb must be given."""
    found: list[str] = []
    for param in command_of(verb).params:
        if isinstance(param, click.Argument) and param.required:
            found.append("olmoe-1b-7b" if isinstance(param.type, click.Choice) else "nowhere")
        elif isinstance(param, click.Option) and param.required:
            found += [param.opts[0], param.type.choices[0] if isinstance(param.type, click.Choice) else "somewhere"]
    return found


def options_of(verb: str) -> list[click.Option]:
    return [param for param in command_of(verb).params if isinstance(param, click.Option)]


VALUED = [(verb, option) for verb in VERBS for option in options_of(verb) if not option.is_flag]
FLAGS = [(verb, option) for verb in VERBS for option in options_of(verb) if option.is_flag]


def named(value: object) -> str:
    return value.opts[0] if isinstance(value, click.Option) else str(value)


@pytest.mark.parametrize(("verb", "option"), VALUED, ids=named)
def test_every_option_refuses_nonsense_or_is_free_text(verb: str, option: click.Option) -> None:
    if option.name in FREE:
        assert isinstance(option.type, (click.types.StringParamType, click.Path))
        return
    if option.name in OWN:
        return
    wrong = list(NO_VALUE)
    if isinstance(option.type, click.FloatRange):
        wrong += ["nan", "inf"]
    if option.name == "threads":
        wrong += ["0", str(devices.max_threads() + 1)]
    if isinstance(option.type, click.IntRange):
        wrong += ["1.5", str(option.type.min - 1)]
    for value in wrong:
        result = invoke(verb, *least_arguments(verb), f"{option.opts[-1]}={value}")
        assert result.exit_code == 2, (value, result.output)
        assert option.opts[-1] in result.stderr
        assert result.stdout == ""


@pytest.mark.parametrize(("verb", "option"), FLAGS, ids=named)
def test_every_flag_refuses_a_value(verb: str, option: click.Option) -> None:
    result = invoke(verb, *least_arguments(verb), f"{option.opts[0]}=1")
    assert result.exit_code == 2, result.output


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "harness"])
def test_every_verb_refuses_unknown_options_and_extra_arguments(verb: str) -> None:
    assert invoke(verb, *least_arguments(verb), "--bogus").exit_code == 2
    many = command_of(verb).params[0].nargs == -1
    assert many or invoke(verb, *least_arguments(verb), "one", "two", "three").exit_code == 2
    if least_arguments(verb):
        assert "Missing" in invoke(verb).stderr
        assert invoke(verb).exit_code == 2


EXPORT = ("export", "nowhere", "-o", "out")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((*EXPORT, "--recipe", "int5"), "there is no recipe 'int5': give int4, int8, fp8, none, or the path of a"),
        ((*EXPORT, "--recipe", "int4", "--bits", "4"), "give only one of --recipe, --bits and --max-size"),
        ((*EXPORT, "--bits", "4", "--max-size", "3GB"), "give only one of --recipe, --bits and --max-size"),
        ((*EXPORT, "--bits", "0"), "0.0 is not in the range 0<x<=32"),
        ((*EXPORT, "--bits", "33"), "33.0 is not in the range 0<x<=32"),
        ((*EXPORT, "--bits", "4", "--ops", "portable"), "schemes that only native operators have"),
        ((*EXPORT, "--max-size", "3 bananas"), "'3 bananas' is not a size: write for example 4GB"),
        ((*EXPORT, "--max-ram", "0"), "'0' is not a size"),
        ((*EXPORT, "--sm", "86"), "--sm: only for --target tensorrt, but the target is cpu"),
        (
            (*EXPORT, "--target", "cuda", "--chunk", "64", "--no-engines"),
            "--engines, --chunk: only for --target tensorrt, but the target is cuda",
        ),
        ((*EXPORT, "--target", "tensorrt", "--sm", "eighty"), "'eighty' is not a list of compute capabilities"),
        ((*EXPORT, "--target", "tensorrt", "--sm", "75"), "--sm 75: the kernels need SM 80 or later"),
        ((*EXPORT, "--target", "tensorrt", "--ops", "portable"), "portable operators run only with ONNX Runtime"),
        ((*EXPORT, "--target", "tensorrt", "--dtype", "fp32"), "compute in bfloat16 or float16, not float32"),
        ((*EXPORT, "--target", "cuda", "--ops", "native"), "native operators run on CPUs only"),
        ((*EXPORT, "--target", "cuda", "--dtype", "fp32"), "does not support grouped-query attention in float32"),
        ((*EXPORT, "--samples", "4"), "--samples: only with --calibration TEXT"),
        ((*EXPORT, "--smooth", "weights"), "--smooth: only with --calibration TEXT"),
        (("quantise", "nowhere", "-o", "out", "--recipe", "int5"), "there is no recipe 'int5'"),
        (
            ("quantize", "nowhere", "-o", "out", "--require-coverage"),
            "--require-coverage: only with --calibration TEXT",
        ),
        (("recipe", "nowhere"), "give --bits or --max-size, one of them"),
        (("recipe", "nowhere", "--bits", "4", "--max-size", "1GB"), "give --bits or --max-size, one of them"),
        (("recipe", "nowhere", "--bits", "4", "--schemes", "int9-g32"), "int9-g32"),
        (("recipe", "nowhere", "--bits", "4", "--schemes", ","), "no schemes to choose from"),
        (("build", "nowhere", "--sm", ""), "'' is not a list of compute capabilities"),
        (("run", "nowhere", "x", "--runtime", "npu"), "there is no runtime 'npu'; there are: onnxruntime-cpu"),
        (("run", "nowhere", "x", "--top-p", "0.5"), "top_p would do nothing with temperature 0"),
        (("run", "nowhere", "x", "--stop", ""), "stop string '' cannot be found"),
        (("run", "nowhere"), "Missing argument 'PROMPT'"),
        (("run", "nowhere", "x", "--system", "y"), "--system needs --chat"),
        (("run", "nowhere", "x", "--messages", "y"), "--messages is the whole conversation"),
        (("chat", "nowhere", "-t", "0", "--top-k", "5"), "top_k would do nothing with temperature 0"),
        (
            ("eval", "int5", "--checkpoint", "nowhere"),
            "there is no bundle, checkpoint or recipe 'int5': give a folder, int4",
        ),
        (("eval", "int4"), "the recipe int4 needs weights to quantise: give the float model with --checkpoint"),
        (("eval", "./nowhere", "--tokens", "8", "--length", "9"), "tokens is 8, less than one window of 9"),
        (("inspect",), "Missing argument 'PATH': give the folder of"),
        (("inspect", "nowhere", "--cpu"), "takes neither PATH nor --verify"),
        (("exprt", "x"), "no such command 'exprt': did you mean 'export'?"),
        (("Run", "x"), "no such command 'Run': did you mean 'run'?"),
        (("xyzzy",), "no such command 'xyzzy': `edgelm --help` lists them"),
        (("run", "nowhere", "x", "--temprature", "1"), "--temperature"),
        (("--bogus", "run"), "No such option"),
    ],
)
def test_wrong_usage_exits_with_2_and_says_what_is_wrong(arguments: tuple[str, ...], said: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert said in " ".join(result.stderr.split())
    assert result.stderr.startswith("Usage: ")
    assert result.stdout == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "nowhere", "x"), ("run", "nowhere", "--messages", "nothing"), ("bench", "nowhere"),
        ("parity", "nowhere"), ("inspect", "nowhere"), ("install", "nowhere", "out"), ("build", "nowhere"),
        ("eval", "./nowhere"), ("export", "./nowhere", "-o", "out"), ("quantize", "./nowhere", "-o", "out"),
        (*EXPORT, "--parity-prompts", "nothing"), ("recipe", "./nowhere", "--bits", "4"),
    ],
)  # fmt: skip
def test_a_missing_input_is_a_failure_in_one_line(arguments: tuple[str, ...]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("edgelm: error: ")
    assert result.stderr.count("\n") == 1


def test_threads_are_limited_to_the_cpus_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "max_threads", lambda: 3)
    assert devices.thread_problem(3) is None
    for verb in ("bench", "parity", "quantize", "export", "eval", "chat"):
        result = invoke(verb, *least_arguments(verb), "--threads", "4")
        assert result.exit_code == 2
        assert "4 threads are more than the 3 CPUs that this process may use: give at most 3, or leave" in result.stderr


def test_an_alias_is_the_verb_and_help_lists_it_once() -> None:
    text = invoke("--help").stdout
    for alias, verb in ALIASES.items():
        assert cli.get_command(click.Context(cli), alias) is command_of(verb)
        assert invoke(alias, "--help").exit_code == 0
        assert f"  {alias} " not in text


NOWHERE = "/nowhere/at/all"


@pytest.mark.parametrize(
    "arguments",
    [
        ("--model", "edgelm", "--model_args", f"bundle={NOWHERE}"),
        ("--model=edgelm", f"--model_args=threads=1,bundle={NOWHERE},kv=int8", "--tasks", "x"),
        ("run", "-M", "edgelm", "--tasks", "x", "-a", "threads=1", f"bundle={NOWHERE}", "--limit", "1"),
        ("--model", "edgelm", "--model_args", f'{{"threads": 1, "bundle": "{NOWHERE}"}}'),
    ],
)
def test_the_harness_checks_the_bundle_before_importing_lm_eval(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgelm.cli.common.options.need_eval_extra", lambda: None)
    monkeypatch.setitem(sys.modules, "edgelm.evaluation.lm_harness", None)  # importing it now raises ImportError
    result = invoke("harness", *arguments)
    assert result.exit_code == 1
    assert f"{NOWHERE} does not exist" in result.stderr


def test_the_harness_requires_a_bundle_only_for_our_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgelm.cli.harness import check_bundle

    monkeypatch.setattr("edgelm.cli.common.options.need_eval_extra", lambda: None)
    result = invoke("harness", "--model", "edgelm", "--tasks", "x")
    assert result.exit_code == 2
    assert "--model edgelm needs a bundle: add --model_args bundle=DIR" in result.stderr
    for others in (
        ("--model", "hf", "--model_args", "pretrained=edgelm"), ("ls", "tasks"), ("--model", "edgelm", "--help"),
        ("--model", "edgelm", "--config", "mine.yaml"),
    ):  # fmt: skip
        check_bundle(others)


SAME = "This device computes the same model as the reference"
GOOD = f"{SAME}: mean KL 1e-05 nats, limit 0.1.\nok  layers\nall 9 checks passed"
NOT = "This device does NOT compute the same model as the reference: it first differs in layer 1."
BAD = f"{NOT}\nFAIL  logits\nok  files\n1 of 9 checks FAILED, with the limits for int4"
RED, GREEN, END = "\x1b[31m\x1b[1m", "\x1b[32m\x1b[1m", "\x1b[0m"


@click.command()
@click.argument("text")
def shown(text: str) -> None:
    echo(text)


def test_results_are_coloured_only_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert CliRunner().invoke(shown, [BAD], color=True).stdout == (
        f"{RED}{NOT}{END}\n{RED}FAIL  logits{END}\nok  files\n{RED}1 of 9 checks FAILED{END}, with the "
        "limits for int4\n"
    )
    assert CliRunner().invoke(shown, [GOOD], color=True).stdout == (
        f"{GREEN}{SAME}{END}: mean KL 1e-05 nats, limit 0.1.\nok  layers\nall 9 checks passed\n"
    )
    assert CliRunner().invoke(shown, [BAD]).stdout == f"{BAD}\n"
    for name, value in (("TERM", "dumb"), ("NO_COLOR", "1")):
        monkeypatch.setenv(name, value)
        assert CliRunner().invoke(shown, [BAD], color=True).stdout == f"{BAD}\n"
        monkeypatch.setenv("TERM", "xterm")


@pytest.mark.parametrize(("verb", "old", "new"), [("build", "--flavour", "--edition"), ("demo", "--out", "--output")])
def test_old_option_names_work_and_are_hidden_in_help(verb: str, old: str, new: str) -> None:
    shown = invoke(verb, "--help").output
    assert new in shown
    assert old not in shown.replace(new, "")
    for name in (old, new):
        assert f"Option '{name}' requires an argument." in invoke(verb, name).output
