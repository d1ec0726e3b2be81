"""Fuzzing of input files: files with one error each, and the result of the command line on them.

python tests/unit/malformed.py [EVERY]     run every EVERY-th probe of every file (1: all, some minutes)
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from edgelm.cli.main import cli

SECONDS = 30
DEEP = "@deep@"
WRONG: dict[str, Any] = {
    "null": None, "a text": "12", "true": True, "a fraction": 1.5, "negative": -1, "zero": 0, "huge": 10**30,
    "beyond memory": 10**9, "a list": [], "a list of texts": ["x"], "an object": {}, "NaN": float("nan"),
    "infinite": float("-inf"), "empty text": "", "control characters": "a\x1b[31m\nb\0", "half a character": "\ud800",
    "path": "../../../etc/passwd", "deep": DEEP,
}  # fmt: skip
DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "not UTF-8": lambda data: b"\xff\xfe" + data,
    "cut": lambda data: data[: len(data) // 2],
    "a list": lambda data: b"[]",
    "null": lambda data: b"null",
    "a number": lambda data: b"12",
    "an empty object": lambda data: b"{}",
    "deep list": lambda data: b"[" * 200_000,
    "deep object": lambda data: b'{"a":' * 200_000,
    "zeros": lambda data: bytes(len(data)),
    "a key twice": lambda data: data.replace(b"{", b'{"format_version": 1, "format_version": 1, ', 1),
    "more behind it": lambda data: data + b"x",
    "bytes changed": lambda data: data[: len(data) // 3] + b"\x7f\x80" + data[len(data) // 3 + 2 :],
}  # fmt: skip
PLACES = ("missing", "a folder", "a pipe", "a link to nothing", "a link to itself")


@dataclass(frozen=True)
class Target:
    """A file in a folder, and the commands that read it: "{}" is the folder, "{new}" a folder to write."""

    folder: str
    file: str
    commands: tuple[tuple[str, ...], ...]
    fields: bool = True
    is_ours: bool = False
    """Whether the file's format is EdgeLM's: then every invalid value in every field must be refused."""


@dataclass(frozen=True)
class Outcome:
    """Result of a probe: its name, how the command ended, and what is wrong with that ("" if nothing is)."""

    probe: str
    command: tuple[str, ...]
    code: int
    said: str
    wrong: str


def paths(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield paths in a document: all fields; of a list the first entry, of an object with many keys the first three."""
    if path:
        yield path
    if isinstance(document, dict):
        for key in list(document)[: 30 if len(path) < 2 else 6]:
            yield from paths(document[key], (*path, key))
    elif isinstance(document, list) and document:
        yield from paths(document[0], (*path, 0))


def changed(document: Any, path: tuple[Any, ...], value: Any) -> bytes:
    """Return the document as JSON with another value at a path; `...` removes the field."""
    found = copy.deepcopy(document)
    inner = found
    for key in path[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return json.dumps(found).replace(f'"{DEEP}"', "[" * 100_000 + "]" * 100_000).encode()


def documents(original: bytes) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Yield names and functions that return the document with one wrong field. Few of the thousands are called."""
    document = json.loads(original)
    for path in paths(document):
        name = ".".join(map(str, path))
        yield f"{name} removed", functools.partial(changed, document, path, ...)
        for kind, value in WRONG.items():
            yield f"{name} {kind}", functools.partial(changed, document, path, value)
    for key in ("surprise", ""):
        yield f"a field {key!r} more", functools.partial(changed, document, (key,), 1)


def probes(target: Target, original: bytes) -> Iterator[tuple[str, Callable[[], bytes] | None]]:
    """Yield names and functions that return the file's contents; None: the name says what replaces the file."""
    for name in PLACES:
        yield name, None
    for name, damage in DAMAGE.items():
        yield name, functools.partial(damage, original)
    if target.fields:
        yield from documents(original)


def put(path: Path, name: str, data: bytes | None) -> None:
    """Replace a file by a probe."""
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    path.unlink(missing_ok=True)
    if data is not None:
        path.write_bytes(data)
    elif name == "a folder":
        path.mkdir()
    elif name == "a pipe":
        os.mkfifo(path)
    elif name == "a link to nothing":
        path.symlink_to("nowhere")
    elif name == "a link to itself":
        path.symlink_to(path.name)


def fit_manifest(folder: Path, file: str) -> None:
    """Write the file's new size into a bundle's manifest, so that the commands read its contents."""
    manifest, path = folder / "manifest.json", folder / file
    if file != "manifest.json" and manifest.exists() and path.is_file():
        document = json.loads(manifest.read_text())
        if file in document["files"]:
            document["files"][file]["size"] = path.stat().st_size
            manifest.write_text(json.dumps(document))


class Hang(BaseException):
    """A command took longer than `SECONDS`."""


@contextlib.contextmanager
def limited() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def judge(command: Sequence[str]) -> Outcome:
    """Run a command in this process; see `Outcome`."""
    start = time.perf_counter()
    with limited():
        result = CliRunner().invoke(cli, list(command), input="hello\n")
    seconds = time.perf_counter() - start
    lines = [line for line in result.stderr.splitlines() if line.startswith(("edgelm: error: ", "Error: "))]
    said = lines[0] if lines else result.stderr.strip()[-300:]
    is_result = command[0] in ("parity", "inspect") and result.exit_code == 1 and not lines
    wrong = ""
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        wrong = f"traceback: {type(result.exception).__name__}: {str(result.exception)[:200]}"
    elif "Traceback" in result.output or "this is a bug" in result.stderr:
        wrong = "unexpected"
    elif result.exit_code not in (0, 1, 2):
        wrong = f"exit code {result.exit_code}"
    elif result.exit_code and len(lines) != 1 and not is_result:
        wrong = f"{len(lines)} lines of errors"
    elif seconds > SECONDS:
        wrong = f"{seconds:.0f} s"
    return Outcome("", tuple(command), result.exit_code, said, wrong)


def run(target: Target, folder: Path, chosen: Callable[[int, str], bool]) -> Iterator[Outcome]:
    """Run the probes of a target for which `chosen` (number, name) is true, in a copy of its folder."""
    with tempfile.TemporaryDirectory() as temporary:
        copied, new = Path(temporary) / "probed", Path(temporary) / "new"
        shutil.copytree(folder, copied)
        path = copied / target.file
        manifest = copied / "manifest.json"
        before = manifest.read_bytes() if manifest.exists() else b""
        for number, (name, make) in enumerate(probes(target, path.read_bytes() if path.is_file() else b"{}")):
            if not chosen(number, name):
                continue
            put(path, name, None if make is None else make())
            fit_manifest(copied, target.file)
            for command in target.commands:
                shutil.rmtree(new, ignore_errors=True)
                arguments = [part.replace("{new}", str(new)).replace("{}", str(copied)) for part in command]
                yield replace(judge(arguments), probe=f"{target.folder}/{target.file}: {name}", command=command)
            if before and target.file != "manifest.json":
                manifest.write_bytes(before)


RUN = ("run", "{}", "hello", "-n", "1", "--threads", "1", "-q")
PARITY = ("parity", "{}", "--no-integrity", "--threads", "1")
EXPORT = ("export", "{}", "-o", "{new}", "--recipe", "int4", "--threads", "1", "--greedy-tokens", "0")
TARGETS = (
    Target("bundle", "manifest.json", (("inspect", "{}"), ("inspect", "{}", "--json"), RUN, PARITY), is_ours=True),
    Target("bundle", "parity/pack.json", (PARITY,), is_ours=True),
    Target("bundle", "parity/pack.npz", (PARITY,), fields=False),
    Target("bundle", "config.json", (RUN, ("inspect", "{}"), PARITY)),
    Target("bundle", "generation_config.json", (RUN,)),
    Target("bundle", "tokenizer_config.json", (RUN, ("run", "{}", "hi", "--chat", "-n", "1", "-q"))),
    Target("bundle", "tokenizer.json", (RUN,), fields=False),
    Target("bundle", "model.onnx", (RUN, ("inspect", "{}"), ("bench", "{}", "--prompt-tokens", "2")), fields=False),
    Target("bundle", "model.debug.onnx", (PARITY,), fields=False),
    Target("bundle", "model.onnx.data", (RUN, ("inspect", "{}")), fields=False),
    Target("portable", "genai_config.json", (("inspect", "{}"), RUN)),
    Target("portable", "config.json", (PARITY,)),
    Target("gpu", "program.json", (("inspect", "{}"), ("inspect", "{}", "--json")), is_ours=True),
    Target("gpu", "kernels/kernels.json", (("inspect", "{}"),), is_ours=True),
    Target("gpu", "engines/x.json", (("inspect", "{}"),), is_ours=True),
    Target("gpu", "model.tensorrt.json", (("build", "{}"),)),
    Target("checkpoint", "config.json", (("inspect", "{}"), EXPORT)),
    Target("checkpoint", "generation_config.json", (EXPORT,)),
    Target("checkpoint", "tokenizer_config.json", (EXPORT,)),
    Target("checkpoint", "tokenizer.json", (EXPORT,), fields=False),
    Target("checkpoint", "model.safetensors", (("inspect", "{}"), EXPORT), fields=False),
    Target("checkpoint", "model.safetensors.index.json", (EXPORT,), fields=False),
    Target("quantized", "calibration.json", (EXPORT, ("inspect", "{}")), is_ours=True),
    Target("quantized", "config.json", (("inspect", "{}"), EXPORT)),
    Target("recipe", "r.toml", (("export", "{checkpoint}", "-o", "{new}", "--recipe", "{}/r.toml"),), fields=False),
    Target("recipe", "p.json", (("export", "{checkpoint}", "-o", "{new}", "--parity-prompts", "{}/p.json",
                                 "--greedy-tokens", "0"),), fields=False),
    Target("recipe", "text.txt", (("eval", "{checkpoint}", "--text", "{}/text.txt", "--tokens", "64", "--no-speed"),
                                  ("recipe", "{checkpoint}", "-o", "{new}", "--bits", "4.5", "--calibration",
                                   "{}/text.txt", "--tokens", "64")), fields=False),
)  # fmt: skip


CHECKPOINTS = Path(__file__).parents[2] / "examples" / "checkpoints"
RECIPE = 'name = "mine"\ndefault = "int4-g32-sym"\n\n[[rule]]\nmatch = "*.mlp.gate.weight"\nscheme = "float"\n'
ENGINE = {
    "format": 1, "file": "engines/x.engine", "flavour": "tensorrt-rtx", "version": "1.7.1", "sms": [86],
    "plugins": "library", "max_batch": 1, "chunk": 512, "context_length": 512, "kv": "float16",
    "operators": {"QuantLinear": 3}, "seconds": 1.5, "linears": "plugin", "attention": "plugin",
    "library": "engines/x.so", "weight_streaming": False,
}  # fmt: skip
KERNELS = {
    "format": 2, "source": "ab", "argument_bytes": {"last_token_f32": 16},
    "images": {"sm_86": {"file": "sm_86.cubin", "nvrtc": [12, 6], "waits": ["last_token_f32"], "resources": {
        "last_token_f32": {"registers": 8, "local_bytes": 0, "shared_bytes": 0, "argument_bytes": 16}}}},
}  # fmt: skip


def folders(root: Path, *, all_kinds: bool = True) -> dict[str, Path]:
    """Return a folder of each kind in the table above, or of "bundle" and "gpu" only."""
    import pytest

    from edgelm.export import ExportOptions, export_bundle
    from edgelm.export.tensorrt import target as gpu_target
    from edgelm.export.tensorrt.options import EngineOptions
    from edgelm.parity.golden import GoldenOptions
    from edgelm.parity.prompts import BUILT_IN
    from edgelm.quant.recipe import Recipe

    golden = GoldenOptions(prompts=BUILT_IN[:2], greedy_tokens=2, max_prompt_tokens=16)
    olmoe, fox = CHECKPOINTS / "olmoe-tiny", CHECKPOINTS / "fox-tiny"
    found = {name: root / name for name in ("bundle", "portable", "gpu", "checkpoint", "quantized", "recipe")}
    int4 = Recipe.load("int4")
    export_bundle(olmoe, found["bundle"], recipe=int4, options=ExportOptions(golden=golden))
    export_bundle(
        olmoe, found["portable"], recipe=Recipe.load("int8"), options=ExportOptions(golden=golden, ops="portable")
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_target, "compile_bundle_kernels", lambda *_: None)
        options = ExportOptions(target="tensorrt", sms=(86,), golden=golden, engines=EngineOptions(build=False))
        export_bundle(olmoe, found["gpu"], recipe=int4, options=options)
    extra = {
        "kernels/kernels.json": json.dumps(KERNELS), "kernels/sm_86.cubin": "cubin", "engines/x.engine": "engine",
        "engines/x.json": json.dumps(ENGINE),
    }  # fmt: skip
    manifest = json.loads((found["gpu"] / "manifest.json").read_text())
    for name, text in extra.items():
        path = found["gpu"] / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        manifest["files"][name] = {"size": len(text), "sha256": "0" * 64}
    (found["gpu"] / "manifest.json").write_text(json.dumps(manifest))
    if not all_kinds:
        return found
    portable = ExportOptions(golden=golden, ops="portable")
    export_bundle(olmoe, found["portable"], recipe=Recipe.load("int8"), options=portable)
    shutil.copytree(fox, found["checkpoint"])
    arguments = ("quantize", str(fox), "-o", str(found["quantized"]), "--recipe", "int4", "--calibration", "builtin",
                 "--samples", "2", "--sample-length", "32")  # fmt: skip
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.stderr
    found["recipe"].mkdir()
    (found["recipe"] / "r.toml").write_text(RECIPE)
    (found["recipe"] / "p.json").write_text('["one", "two"]')
    (found["recipe"] / "text.txt").write_text("Once upon a time. " * 200)
    return found


def main() -> None:
    every = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    only = sys.argv[2:]
    with tempfile.TemporaryDirectory() as temporary:
        made = folders(Path(temporary))
        counts: Counter[str] = Counter()
        for target in TARGETS:
            name = f"{target.folder}/{target.file}"
            if only and not any(part in name for part in only):
                continue
            commands = tuple(
                tuple(part.replace("{checkpoint}", str(made["checkpoint"])) for part in command)
                for command in target.commands
            )
            start, mine = time.perf_counter(), Counter[str]()
            here = replace(target, commands=commands)
            for found in run(here, made[target.folder], lambda number, _: number % every == 0):
                mine["probes"] += 1
                if found.wrong:
                    mine["wrong"] += 1
                    print(f"WRONG {found.probe} [{found.command[0]}]: {found.wrong} | {found.said[:300]}", flush=True)
                elif found.code == 0:
                    mine["accepted"] += 1
                    print(f"accepted {found.probe} [{found.command[0]}]")
                else:
                    print(f"refused {found.probe} [{found.command[0]}]: {found.said[:300]}")
            counts += mine
            print(f"=== {name}: {dict(mine)} in {time.perf_counter() - start:.0f} s", flush=True)
        print(f"=== all: {dict(counts)}")


if __name__ == "__main__":
    main()
