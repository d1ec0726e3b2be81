"""Options that several verbs share, each defined once, and what makes them wrong usage.

Wrong usage, exit code 2, is what the command line alone shows to be wrong. What only a file, a model or the machine
shows is a failure, exit code 1.
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
from edgelm.errors import EdgeLMError

if TYPE_CHECKING:
    from edgelm.quant.calibration import CalibrationOptions

Command = TypeVar("Command", bound=Callable[..., Any])

PATH = click.Path(path_type=Path)
BUNDLE = PATH
REPORT_FILE = click.Path(path_type=Path, dir_okay=False)


@contextlib.contextmanager
def as_usage() -> Iterator[None]:
    """Around a check that sees nothing but options: what it refuses is wrong usage.

    Raises:
        click.UsageError: in place of an EdgeLMError.
    """
    try:
        yield
    except EdgeLMError as error:
        raise click.UsageError(str(error)) from error


def was_given(*names: str) -> list[str]:
    """Those of the running verb's options, by the names of their parameters, that the command line holds."""
    context = click.get_current_context()
    default = (click.core.ParameterSource.DEFAULT, click.core.ParameterSource.DEFAULT_MAP)
    given_names = {name for name in names if context.get_parameter_source(name) not in (None, *default)}
    return [option.opts[0] for option in context.command.params if option.name in given_names]


EXPORT_PACKAGES = ("torch", "onnx", "huggingface_hub")
"""Files of safetensors we read and write ourselves."""


def need_export_extra() -> None:
    """Check that the packages of the extra `export` are installed.

    Raises:
        EdgeLMError: names what is missing and how to install it.
    """
    from edgelm.installing import install_hint

    missing = [name for name in EXPORT_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise EdgeLMError(
            f"this needs {', '.join(missing)}, which a run-only install leaves out: {install_hint('export')}"
        )


def need_eval_extra() -> None:
    """Check that lm-evaluation-harness is installed.

    Raises:
        EdgeLMError: it is not; says how to install it.
    """
    from edgelm.installing import install_hint

    if importlib.util.find_spec("lm_eval") is None:
        raise EdgeLMError(f"this needs lm-evaluation-harness: {install_hint('eval')}")


class Renamed(click.Option):
    """An option whose later names are its old ones: they work, and no help shows them."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """The option's line of the help."""
        names, self.opts = self.opts, [name for name in self.opts if not name.startswith("--")] + self.opts[:1]
        try:
            return super().get_help_record(ctx)
        finally:
            self.opts = names


class Number(click.FloatRange):
    """A number in a range; "nan" and "inf", which Python takes for numbers, are none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number."""
        found = super().convert(value, param, ctx)
        if not math.isfinite(found):
            self.fail(f"{value!r} is not a number.", param, ctx)
        return found


class Threads(click.IntRange):
    """A number of threads, at most the CPUs that this process may use: more would only wait for each other."""

    def __init__(self) -> None:
        super().__init__(min=1)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number."""
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
        """The number of bytes."""
        from edgelm.sizes import parse_size

        try:
            return value if isinstance(value, int) else parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class RuntimeName(click.ParamType[str]):
    """The name of a runtime that there is, whether or not it is installed here."""

    name = "runtime"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The name as it is."""
        from edgelm.runtimes import runtimes

        names = [entry.name for entry in runtimes()]
        if value not in names:
            self.fail(f"there is no runtime {value!r}; there are: {', '.join(names)}", param, ctx)
        return str(value)


class RecipeName(click.ParamType[str]):
    """The name of a preset, or an existing file."""

    name = "recipe"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The name as it is."""
        from edgelm.quant.recipe import PRESETS

        if value not in PRESETS and not Path(value).is_file():
            self.fail(
                f"there is no recipe {value!r}: give {', '.join(PRESETS)}, or the path of a .toml file", param, ctx
            )
        return str(value)


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on standard output.")
kv_option = click.option(
    "--kv",
    type=click.Choice(KV_TYPES),
    help="Type of the cache [as exported: float16 unless the recipe says another; float32 for portable bundles].",
)
report_option = click.option("--report", "report_path", type=REPORT_FILE, help="Write an HTML report.")
runtime_option = click.option(
    "--runtime", type=RuntimeName(), metavar="NAME", help="Runtime [the best one here]; `edgelm doctor` lists them."
)
weight_memory_option = click.option(
    "--weight-memory",
    type=Size(),
    metavar="SIZE",
    help="Weights that may lie in the GPU's memory, for a TensorRT engine that streams them, for example 2GB [all].",
)


def output_option(what: str, *, required: bool = True) -> Callable[[Command], Command]:
    """-o, `what` is written there."""
    return click.option("-o", "--output", "out", required=required, type=PATH, help=what)


def overwrite_option(what: str) -> Callable[[Command], Command]:
    """--overwrite, which replaces `what`."""
    return click.option("--overwrite", is_flag=True, help=f"Replace {what} once the new one is complete.")


def threads_option(what: str = "Threads [physical cores allowed].") -> Callable[[Command], Command]:
    """--threads, with the verb's own default."""
    return click.option("--threads", type=Threads(), help=what)


def together(name: str, *options: Any, make: Callable[..., Any] = dict) -> Callable[[Command], Command]:
    """Options that a verb takes as one parameter, `name`: what `make` makes of their values."""

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def called(*arguments: Any, **values: Any) -> Any:
            values[name] = make(**{key: values.pop(key) for key in keys})
            return command(*arguments, **values)

        decorated: Any = called
        before = len(getattr(called, "__click_params__", ()))
        for option in reversed(options):
            decorated = option(decorated)
        keys = [option.name for option in decorated.__click_params__[before:]]
        return decorated  # type: ignore[no-any-return]

    return decorate


def given(**options: Any) -> dict[str, Any]:
    """Drop the options that were left out, so that the library's defaults hold."""
    return {name: value for name, value in options.items() if value is not None}


loading_options = together(
    "loading",
    runtime_option,
    threads_option(),
    click.option("--context-length", type=click.IntRange(min=1), help="Positions to allocate [model's, <= 4096]."),
    kv_option,
    weight_memory_option,
    make=given,
)
"""Which runtime, how many threads, how much context, what cache, how many weights on a GPU: `loading`."""


def sampling_options(temperature: float) -> Callable[[Command], Command]:
    """How tokens are chosen and when to stop: `sampling`. `temperature` is the verb's default."""
    return together(
        "sampling",
        click.option(
            "--max-tokens", "-n", type=click.IntRange(min=1), default=256, show_default=True,
            help="Tokens to generate at most.",
        ),
        click.option(
            "--temperature", "-t", type=Number(min=0), default=temperature, show_default=True,
            help="0: always the most likely token.",
        ),
        click.option("--top-k", type=click.IntRange(min=0), help="Only the K most likely tokens; 0: all."),
        click.option("--top-p", type=Number(0, 1, min_open=True), help="Only the most likely that reach this."),
        click.option("--min-p", type=Number(0, 1), help="Only tokens this fraction as likely as the best."),
        click.option(
            "--repetition-penalty", type=Number(min=0, min_open=True), default=1.0, show_default=True,
            help="Above 1 avoids tokens that were there already.",
        ),
        click.option("--seed", type=click.IntRange(0, 2**64 - 1), help="Make sampling repeatable."),
        click.option("--stop", multiple=True, metavar="TEXT", help="Stop before this text; may be repeated."),
        make=_checked_sampling,
    )  # fmt: skip


def _checked_sampling(**options: Any) -> dict[str, Any]:
    """The options that were given; none that would do nothing together, no stop strings that cannot be found.

    Raises:
        click.UsageError: saying which.
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
    """What `calibration_options` came to; None without --calibration.

    Raises:
        click.UsageError: another of them was given without it.
    """
    if calibration is None:
        if require_coverage or any(value is not None for value in (samples, sample_length, min_expert_tokens, smooth)):
            raise click.UsageError(
                "--samples, --sample-length, --min-expert-tokens, --require-coverage and --smooth go with --calibration"
            )
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
    click.option("--calibration", metavar="TEXT", help="Calibration text: a file, a folder, or builtin."),
    click.option(
        "--smooth",
        type=click.Choice(["activations", "weights"]),
        help="Scale float weights first, the model's function kept: activations where these are int8 or fp8, "
        "weights where they are float.",
    ),
    click.option("--samples", type=click.IntRange(min=1), help="Samples of the text [128]."),
    click.option("--sample-length", type=click.IntRange(min=2), help="Tokens of a sample [512]."),
    click.option(
        "--min-expert-tokens",
        type=click.IntRange(min=0),
        help="Tokens that an expert needs to be calibrated [as many as its inputs have values].",
    ),
    click.option("--require-coverage", is_flag=True, help="Fail where an expert sees too few tokens to be calibrated."),
    make=_chosen_calibration,
)
"""Whether to calibrate, with which text, and when an expert has seen enough of it: `calibration`."""


ENGINE_PARAMETERS = ("sms", "build", "matmul", "attention", "max_batch", "chunk", "weight_streaming")
"""The parameters that are about `--target tensorrt` alone."""


def chosen_sms(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    """The numbers of --sm."""
    del context, parameter
    if text is None:
        return None
    parts = [part.strip().removeprefix("sm_") for part in text.split(",")]
    if not all(part.isdigit() for part in parts):
        raise click.BadParameter(f"{text!r} is no list of compute capabilities: write for example 86,89")
    return tuple(dict.fromkeys(int(part) for part in parts))


_BUILDING = (
    click.option(
        "--max-batch", default=32, show_default=True, type=click.IntRange(min=1),
        help="Sequences that decode together, at most.",
    ),
    click.option(
        "--chunk", default=512, show_default=True, type=click.IntRange(min=1), help="Tokens of a prefill step."
    ),
    click.option("--weight-streaming", is_flag=True, help="Let weights stay in host memory (run --weight-memory)."),
)  # fmt: skip
_INSIDE = click.Choice(["engine", "plugin"])
build_options = together("building", *_BUILDING)
"""What an engine is built for: `building`, fields of `BuildOptions`."""
engine_options = together(
    "engine",
    *_BUILDING,
    click.option(
        "--engines/--no-engines", "build", default=None,
        help="With --target tensorrt: build engines now [if TensorRT is installed].",
    ),
    click.option(
        "--matmul", default="engine", show_default=True, type=_INSIDE,
        help="Matmuls inside the engine: TensorRT's own where it has them, or our plugin.",
    ),
    click.option(
        "--attention", default="plugin", show_default=True, type=_INSIDE,
        help="Attention implementation inside the engine.",
    ),
)  # fmt: skip
"""With --target tensorrt, whether engines are built, for what, and what is inside: `engine`, of `EngineOptions`."""
