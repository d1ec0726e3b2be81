"""Engines of the benchmark: which are available, the files that they need, and their worker processes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import figures

import edgelm
from edgelm.benchmark import bytes_per_token
from edgelm.bundle import Bundle, Manifest

HERE = Path(__file__).parent
FILE_TYPES = {"int4": "Q4_0", "int8": "Q8_0"}
MATCHES = ("llama.cpp", "portable", "openvino")


@dataclass(frozen=True, eq=False)
class Engine:
    """An engine with its settings: worker script, Python interpreter, arguments of `load`, and path of the weights.

    `only_long`: it is measured only in the rows with the long prompt.
    """

    name: str
    script: str
    python: str
    options: dict[str, Any]
    weights: Path
    bytes_per_token: float
    only_long: bool = False


class Worker:
    """The process of an engine. Its output goes to `log`."""

    def __init__(self, script: str, python: str, log: Path) -> None:
        package = Path(edgelm.__file__).parents[1]
        environment = {**os.environ, "PYTHONPATH": f"{package}{os.pathsep}{HERE}"}
        # Each engine has its own option for threads.
        environment.pop("OMP_NUM_THREADS", None)
        self.log = log
        with log.open("ab") as errors:
            self.started = time.perf_counter()
            self.process = subprocess.Popen(
                [python, str(HERE / script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                env=environment,
            )  # fmt: skip

    def __call__(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Run a command in the worker and return its answer."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            raise SystemExit(f"{self.process.args} ended with code {code} in {do}: see the end of {self.log}")
        result: dict[str, Any] = json.loads(line)
        return result

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.process.stdin and self.process.stdout
        if error is not None:
            self.process.kill()
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@dataclass
class Workplace:
    """The folder with bundles and files of other engines, and the Python interpreters that have these engines."""

    work: Path
    threads: int
    llama_python: str
    openvino_python: str
    notes: list[str] = field(default_factory=list)

    @property
    def log(self) -> Path:
        """The file for the output of the workers."""
        return self.work / "workers.log"

    def native(self, name: str, checkpoint: Path, recipe: str) -> list[Engine]:
        """Return our native bundle with both types of KV cache."""
        bundle = self._bundle(name, checkpoint, recipe, "native")
        kinds = ((figures.NATIVE, "float16"), (figures.NATIVE_INT8, "int8"))
        return [self._ours(engine, bundle, kv) for engine, kv in kinds]

    def peers(self, match: str, name: str, checkpoint: Path, recipe: str) -> list[Engine]:
        """Return the other engines of a match; empty, with a note, if packages are missing or the model is unsupported.

        Raises:
            SystemExit: a file of an engine cannot be made.
        """
        make: Callable[[str, Path, str], list[Engine]] = {
            "llama.cpp": self._llama, "portable": self._portable, "openvino": self._openvino,
        }[match]  # fmt: skip
        return make(name, checkpoint, recipe)

    def _skip(self, text: str) -> list[Engine]:
        if text not in self.notes:
            self.notes.append(text)
            print(text)
        return []

    def _has(self, python: str, *modules: str) -> bool:
        asked = [python, "-c", f"import {', '.join(modules)}"]
        try:
            return subprocess.run(asked, capture_output=True, check=False).returncode == 0
        except FileNotFoundError:
            return False

    def _ours(self, engine: str, bundle: Bundle, kv: str | None) -> Engine:
        return Engine(
            engine, "edgelm_worker.py", sys.executable, {"path": str(bundle.path), "kv": kv},
            bundle.path / bundle.manifest.graph.weights_file, bytes_per_token(bundle.manifest, 0),
        )  # fmt: skip

    def _portable(self, name: str, checkpoint: Path, recipe: str) -> list[Engine]:
        return [self._ours(figures.PORTABLE, self._bundle(name, checkpoint, recipe, "portable"), None)]

    def _llama(self, name: str, checkpoint: Path, recipe: str) -> list[Engine]:
        if recipe not in FILE_TYPES:
            return self._skip(f"llama.cpp is left out of {recipe}: it has no format of that width here")
        if not self._has(self.llama_python, "llama_cpp", "gguf"):
            return self._skip(f"llama.cpp is left out: {self.llama_python} lacks llama-cpp-python or gguf")
        gguf = self.work / f"{name}-{FILE_TYPES[recipe]}.gguf"
        with Worker("llamacpp_worker.py", self.llama_python, self.log) as worker:
            made = worker("prepare", checkpoint=str(checkpoint), out=str(gguf), file_type=FILE_TYPES[recipe])
        settings = (
            (figures.LLAMA, True, "f16"), (figures.LLAMA_PLAIN, False, "f16"), (figures.LLAMA_Q8, True, "q8_0"),
        )  # fmt: skip
        return [
            Engine(
                engine, "llamacpp_worker.py", self.llama_python, {"path": str(gguf), "flash": flash, "cache": cache},
                gguf, made["bytes"], only_long=cache != "f16",
            )
            for engine, flash, cache in settings
        ]  # fmt: skip

    def _openvino(self, name: str, checkpoint: Path, recipe: str) -> list[Engine]:
        config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
        if "num_experts" in config:
            return self._skip(f"openvino is left out of {name}: it has no such model")
        if recipe not in FILE_TYPES:
            return self._skip(f"openvino is left out of {recipe}: it has no format of that width here")
        if not self._has(self.openvino_python, "openvino_genai"):
            return self._skip(f"openvino is left out: {self.openvino_python} lacks openvino-genai")
        folder = self.work / f"{name}-openvino-{recipe}"
        if not folder.exists():
            asked = [self.openvino_python, str(HERE / "openvino_from_checkpoint.py"), str(checkpoint), str(folder)]
            with self.log.open("ab") as log:
                code = subprocess.run([*asked, "--width", recipe], stdout=log, stderr=log, check=False).returncode
            if code:
                raise SystemExit(f"{' '.join(asked)} ended with code {code}: see the end of {self.log}")
        weights = folder / "openvino_model.bin"
        # Dense with a tied head: a token reads the whole file.
        options = {"path": str(folder)}
        return [
            Engine(
                figures.OPENVINO, "openvino_worker.py", self.openvino_python, options, weights, weights.stat().st_size
            )
        ]

    def _bundle(self, name: str, checkpoint: Path, recipe: str, ops: str) -> Bundle:
        """Return the bundle; export it if it does not exist, and record the export's time, peak memory and parity."""
        path = self.work / f"{name}-{recipe}-{ops}"
        if not path.exists():
            seconds, peak = _export(checkpoint, path, recipe, ops)
            print(f"{path.name}: exported in {seconds:.0f} s, peak {peak / 2**30:.2f} GiB")
            report = edgelm.check_parity(path, threads=self.threads)
            print(f"{path.name}: parity {'passed' if report.passed else 'failed'}, KL {report.kl_mean:.2e} nats")
            if not report.passed:
                raise SystemExit(f"{path} fails parity: nothing is timed; run `edgelm parity {path}`")
        return Bundle.open(path)


def cache_bytes(manifest: Manifest, tokens: int, kv: str | None) -> int:
    """Return the bytes of the keys and values of `tokens` tokens."""
    return bytes_per_token(manifest, tokens, kv) - bytes_per_token(manifest, 0, kv)


def _export(checkpoint: Path, bundle: Path, recipe: str, ops: str) -> tuple[float, int]:
    """Run `edgelm export` in its own process; return the seconds and its peak resident bytes."""
    asked = [sys.executable, "-P", "-m", "edgelm", "export", str(checkpoint), "-o", str(bundle)]
    asked += ["--recipe", recipe, "--ops", ops]
    start = time.perf_counter()
    process = subprocess.Popen(asked, stderr=subprocess.DEVNULL)
    peak = 0
    # Not the figure of wait4, which includes memory of this process at the fork.
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        peak = max(peak, *(int(kib) for kib in re.findall(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)), 0)
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"the export failed: run `edgelm {' '.join(asked[4:])}` to see why")
    return time.perf_counter() - start, peak * 1024
