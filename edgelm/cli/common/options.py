"""Options that several verbs share, and the checks of their values.

Exit code 2 (wrong usage) is for errors that the command line alone shows; exit code 1 (failure) for errors that only a
file, a model or the machine shows.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edgelm.bundle.kv_cache import KV_TYPES
from edgelm.cli.common.help import Group, option
from edgelm.errors import EdgeLMError

if TYPE_CHECKING:
    from edgelm.quant.calibration import CalibrationOptions

Command = TypeVar("Command", bound=Callable[..., Any])

PATH = click.Path(path_type=Path)
BUNDLE = PATH
REPORT_FILE = click.Path(path_type=Path, dir_okay=False)


@contextlib.contextmanager
def as_usage() -> Iterator[None]:
    """Turn an EdgeLMError of the block into wrong usage: for checks that depend on options alone.

    Raises:
        click.UsageError: in place of an EdgeLMError.
    """
    try:
        yield
    except EdgeLMError as error:
        raise click.UsageError(str(error)) from error


def was_given(*names: str) -> list[str]:
    """Return those of the running verb's options that the command line has; `names` are names of parameters."""
    context = click.get_current_context()
    default = (click.core.ParameterSource.DEFAULT, click.core.ParameterSource.DEFAULT_MAP)
    given_names = {name for name in names if context.get_parameter_source(name) not in (None, *default)}
    return [option.opts[0] for option in context.command.params if option.name in given_names]


EXPORT_PACKAGES = ("torch", "onnx", "huggingface_hub")
"""Packages of the extra `export`. There is no safetensors: EdgeLM reads and writes these files itself."""


def need_export_extra() -> None:
    """Check that the packages of the extra `export` are installed.

    Raises:
        EdgeLMError: names what is missing and how to install it.
    """
    from edgelm.installing import install_hint

    missing = [name for name in EXPORT_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise EdgeLMError(f"this command needs {', '.join(missing)}, not installed here: {install_hint('export')}")


def need_eval_extra() -> None:
    """Check that lm-evaluation-harness is installed.

    Raises:
        EdgeLMError: it is not; says how to install it.
    """
    from edgelm.installing import install_hint

    if importlib.util.find_spec("lm_eval") is None:
        raise EdgeLMError(f"this command needs lm-evaluation-harness, not installed here: {install_hint('eval')}")


class Number(click.FloatRange):
    """A number in a range; "nan" and "inf" are refused."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number."""
        found = super().convert(value, param, ctx)
        if not math.isfinite(found):
            self.fail(f"{value!r} is not a number.", param, ctx)
        return found


class Whole(click.IntRange):
    """A whole number in a range; click calls "x" no valid "integer range"."""

    name = "whole number"


class Threads(Whole):
    """A number of threads, at most the CPUs that this process may use."""

    def __init__(self) -> None:
        super().__init__(min=1)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number."""
        from edgelm.devices import thread_problem

        found = super().convert(value, param, ctx)
        why = thread_problem(found)
        if why is not None:
            self.fail(why, param, ctx)
        return found


class Size(click.ParamType[int]):
    """Bytes, as "2GB" or "2GiB"."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number of bytes."""
        from edgelm.sizes import parse_size

        try:
            return value if isinstance(value, int) else parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class RuntimeName(click.ParamType[str]):
    """The name of a known runtime, installed or not."""

    name = "runtime"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the name unchanged."""
        from edgelm.runtimes import runtimes

        names = [entry.name for entry in runtimes()]
        if value not in names:
            self.fail(f"there is no runtime {value!r}; there are: {', '.join(names)}", param, ctx)
        return str(value)


class RecipeName(click.ParamType[str]):
    """The name of a preset recipe, or an existing file."""

    name = "recipe"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the name unchanged.

        Raises:
            RecipeError: the file is no recipe. Found here, before the slow import of torch.
        """
        from edgelm.quant.recipe import PRESETS, Recipe

        if value not in PRESETS and not Path(value).is_file():
            self.fail(
                f"there is no recipe {value!r}: give {', '.join(PRESETS)}, or the path of a .toml file", param, ctx
            )
        Recipe.load(value)
        return str(value)


json_option = option("--json", "as_json", is_flag=True, help="Print one JSON document on standard output.")
kv_option = option(
    "--kv",
    group=Group.RUNTIME,
    type=click.Choice(KV_TYPES),
    default_text="as exported: float16; float32 for recipe `none` and for portable bundles",
    help="Data type of the KV cache. int8 and fp8 take about half the memory of float16.",
)
report_option = option(
    "--report", "report_path", metavar="FILE", type=REPORT_FILE, help="Also write the result as an HTML page."
)
runtime_option = option(
    "--runtime",
    group=Group.RUNTIME,
    type=RuntimeName(),
    metavar="NAME",
    default_text="the best one here",
    help="Runtime to use. `edgelm doctor` lists them.",
)
weight_memory_option = option(
    "--weight-memory",
    group=Group.GPU,
    type=Size(),
    metavar="SIZE",
    default_text="all of them",
    help="How much of the weights to keep in GPU memory, for example 2GB. Needs a TensorRT engine that was built with "
    "--weight-streaming.",
)
PHYSICAL_CORES = "the physical cores that this process may use"


def output_option(what: str, *, metavar: str = "DIR", **settings: Any) -> Callable[[Command], Command]:
    """-o, with `what` as its help."""
    return option("-o", "--output", "out", metavar=metavar, type=PATH, help=what, **settings)


def overwrite_option(what: str) -> Callable[[Command], Command]:
    """--overwrite, which replaces `what`."""
    return option("--overwrite", is_flag=True, help=f"Replace {what} once the new one is complete.")


def verbose_option(what: str) -> Callable[[Command], Command]:
    """-v, with `what` as its help."""
    return option("-v", "--verbose", is_flag=True, help=what)


def threads_option(what: str = "CPU threads.", group: Group = Group.RUNTIME) -> Callable[[Command], Command]:
    """--threads, with `what` as its help."""
    return option("--threads", group=group, type=Threads(), default_text=PHYSICAL_CORES, help=what)


def together(name: str, *options: Any, make: Callable[..., Any] = dict) -> Callable[[Command], Command]:
    """Add options that the verb receives as one parameter `name`: the result of `make`, called with their values."""

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def called(*arguments: Any, **values: Any) -> Any:
            values[name] = make(**{key: values.pop(key) for key in keys})
            return command(*arguments, **values)

        decorated: Any = called
        before = len(getattr(called, "__click_params__", ()))
        for decorator in reversed(options):
            decorated = decorator(decorated)
        keys = [param.name for param in decorated.__click_params__[before:]]
        return decorated  # type: ignore[no-any-return]

    return decorate


def given(**options: Any) -> dict[str, Any]:
    """Return the options that are not None; the library's defaults stand for the others."""
    return {name: value for name, value in options.items() if value is not None}


loading_options = together(
    "loading",
    runtime_option,
    threads_option(),
    option(
        "--context-length",
        group=Group.RUNTIME,
        type=Whole(min=1),
        default_text="the model's, at most 4096",
        help="Tokens to allocate the KV cache for: prompt and answer together.",
    ),
    kv_option,
    weight_memory_option,
    make=given,
)
"""Runtime, threads, context, KV cache and GPU memory of a loaded model: the parameter `loading`."""


def sampling_options(temperature: float) -> Callable[[Command], Command]:
    """How tokens are chosen and when to stop: the parameter `sampling`. `temperature` is the verb's default."""
    return together(
        "sampling",
        option(
            "-n", "--max-tokens", type=Whole(min=1), default=256, help="Tokens to generate at most."
        ),
        option(
            "-t", "--temperature", group=Group.SAMPLING, type=Number(min=0), default=temperature,
            help="Randomness of the choice; 0 always takes the most probable token.",
        ),
        option(
            "--top-k", group=Group.SAMPLING, metavar="K", type=Whole(min=0), default_text="0, all tokens",
            help="Sample from the K most probable tokens.",
        ),
        option(
            "--top-p", group=Group.SAMPLING, metavar="P", type=Number(0, 1, min_open=True),
            default_text="1, all tokens",
            help="Sample from the most probable tokens whose probabilities add up to P.",
        ),
        option(
            "--min-p", group=Group.SAMPLING, metavar="P", type=Number(0, 1), default_text="0, all tokens",
            help="Drop tokens less than P times as probable as the most probable one.",
        ),
        option(
            "--repetition-penalty", group=Group.SAMPLING, type=Number(min=0, min_open=True), default=1.0,
            default_text="1, off",
            help="Above 1, make tokens less probable that the text already has.",
        ),
        option(
            "--seed", group=Group.SAMPLING, type=Whole(0, 2**64 - 1), default_text="random",
            help="Seed of the random numbers: the same seed gives the same text.",
        ),
        option(
            "--stop", group=Group.SAMPLING, multiple=True, metavar="TEXT",
            help="Stop before this text is generated. May be repeated.",
        ),
        make=_checked_sampling,
    )  # fmt: skip


def _checked_sampling(**options: Any) -> dict[str, Any]:
    """Check the sampling options and return those that were given.

    Raises:
        click.UsageError: options contradict each other, or a stop string is empty.
    """
    filters = {name: options[name] for name in ("top_k", "top_p", "min_p") if options[name] is not None}
    with as_usage():
        if options["stop"]:
            from edgelm.generation.stop_strings import StopStrings

            StopStrings(options["stop"])
        if filters and options["temperature"] == 0:
            from edgelm.generation.sampling import Sampling  # imports numpy: only where there is something to refuse

            Sampling(temperature=0, **filters)
    return given(**options)


def _chosen_calibration(
    calibration: str | None,
    samples: int | None,
    sample_length: int | None,
    min_expert_tokens: int | None,
    require_coverage: bool,
    smooth: str | None,
) -> CalibrationOptions | None:
    """Return the calibration options; None without --calibration.

    Raises:
        click.UsageError: another calibration option was given without it.
    """
    if calibration is None:
        others = was_given("samples", "sample_length", "smooth", "min_expert_tokens", "require_coverage")
        if others:
            raise click.UsageError(f"{', '.join(others)}: only with --calibration TEXT")
        return None
    need_export_extra()
    from edgelm.quant.calibration import CalibrationOptions, CoverageOptions

    with as_usage():
        return CalibrationOptions(
            text=calibration,
            coverage=CoverageOptions(min_tokens=min_expert_tokens),
            require_coverage=require_coverage,
            smoothing=smooth,
            **given(samples=samples, length=sample_length),
        )


calibration_options = together(
    "calibration",
    option(
        "--calibration",
        group=Group.CALIBRATION,
        metavar="TEXT",
        default_text="none, round weights to nearest",
        help="Calibration text: a file, a folder, or `builtin` (Python's standard library). An interrupted run resumes "
        "when the same command is given again.",
    ),
    option(
        "--samples", group=Group.CALIBRATION, type=Whole(min=1), default_text="128",
        help="Number of samples taken from the text.",
    ),
    option(
        "--sample-length", group=Group.CALIBRATION, type=Whole(min=2), default_text="512",
        help="Tokens in a sample.",
    ),
    option(
        "--smooth",
        group=Group.CALIBRATION,
        type=click.Choice(["activations", "weights"]),
        default_text="off",
        help="Rescale columns before quantising, without changing the float model: `activations` where these are int8 "
        "or fp8, `weights` where activations are float.",
    ),
    option(
        "--min-expert-tokens", group=Group.CALIBRATION, type=Whole(min=0),
        default_text="the columns of its widest matrix",
        help="Tokens that an expert must see to be calibrated; with fewer it is rounded to nearest.",
    ),
    option(
        "--require-coverage", group=Group.CALIBRATION, is_flag=True,
        help="Fail where an expert sees fewer tokens than --min-expert-tokens.",
    ),
    make=_chosen_calibration,
)  # fmt: skip
"""Calibration text, its size, and how many tokens an expert needs: the parameter `calibration`."""


ENGINE_PARAMETERS = ("sms", "build", "matmul", "attention", "max_batch", "chunk", "weight_streaming",
                     "embed_plugins")  # fmt: skip
"""Parameters of options that only `--target tensorrt` has."""


def chosen_sms(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    """Parse --sm: return the compute capabilities, None where the option was not given."""
    del context, parameter
    if text is None:
        return None
    parts = [part.strip().removeprefix("sm_") for part in text.split(",")]
    if not all(part.isdigit() for part in parts):
        raise click.BadParameter(f"{text!r} is not a list of compute capabilities: write for example 86,89")
    return tuple(dict.fromkeys(int(part) for part in parts))


def _building(group: Group) -> tuple[Callable[[Command], Command], ...]:
    return (
        option(
            "--max-batch", group=group, default=32, type=Whole(min=1),
            help="Sequences that can decode together, at most.",
        ),
        option(
            "--chunk", group=group, default=512, type=Whole(min=1),
            help="Tokens of a prefill step, at most.",
        ),
        option(
            "--weight-streaming", group=group, is_flag=True,
            help="Build engines whose weights can stay in host memory (see --weight-memory of `edgelm run`).",
        ),
        option(
            "--embed-plugins", group=group, is_flag=True,
            help="Store the library of our plugins in the engine too, so that the engine is complete by itself.",
        ),
    )  # fmt: skip


_INSIDE = click.Choice(["engine", "plugin"])
build_options = together("building", *_building(Group.COMMON))
"""What an engine is built for: the parameter `building`, fields of `BuildOptions`."""
engine_options = together(
    "engine",
    option(
        "--engines/--no-engines", "build", group=Group.TENSORRT, default=None,
        default_text="yes if TensorRT is installed", help="Build engines now, or leave that to `edgelm build`.",
    ),
    *_building(Group.TENSORRT),
    option(
        "--matmul", group=Group.TENSORRT, default="engine", type=_INSIDE,
        help="Matmul implementation: TensorRT's own where it has one, or our plugin.",
    ),
    option(
        "--attention", group=Group.TENSORRT, default="plugin", type=_INSIDE,
        help="Attention implementation: TensorRT's own, or our plugin.",
    ),
)  # fmt: skip
"""Whether engines are built, for what, and what is inside: the parameter `engine`, fields of `EngineOptions`."""
