"""Descriptions of a bundle's engines, and the plugins that an engine contains, read without TensorRT and without a GPU.

`engines/NAME.json` describes `engines/NAME.engine`. TensorRT's inspector needs the GPU that the engine is for. But a
plugin's serialised form is text that we wrote, so our plugins of every layer can be found in the engine's bytes.
"""

from __future__ import annotations

import dataclasses
import json
import mmap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from edgelm.bundle import ENGINES
from edgelm.errors import BundleError
from edgelm.json_dataclass import (
    Count,
    ErrorFactory,
    OneOf,
    Range,
    from_data,
    parse,
    quoted,
    read_bytes,
    require_format,
)
from edgelm.runtimes.tensorrt.library import FULL, RTX, TITLES
from edgelm.runtimes.tensorrt.plugin_spec import END, MARK, PREFIX, PluginSpec
from edgelm.sizes import format_size

if TYPE_CHECKING:
    from edgelm.bundle import Bundle

FOLDER = ENGINES
LIBRARY, EMBEDDED, PYTHON = "library", "embedded", "python"
_FORMAT = 1
_SPEC_LIMIT = 1 << 16
_ERRORS = ErrorFactory(BundleError, "run `edgelm build` again")
_Size = Annotated[int, Range(1, (1 << 31) - 1)]


@dataclass(frozen=True)
class EngineInfo:
    """The description of an engine.

    Attributes:
        file: its path within the bundle.
        flavour: the edition of TensorRT, `library.FULL` or `library.RTX`; see `edition`.
        version: version of the TensorRT that built it; the same must run it.
        sms: compute capabilities that it was built for, e.g. (86, 89).
        plugins: where the library of plugins is: "library": in the file `library`; "embedded": in the engine too.
            "python": the engine is of EdgeLM 0.2 or older, whose plugins were written in Python.
        library: path within the bundle of the library that the engine was built with.
        max_batch: sequences that can decode together.
        chunk: the largest number of tokens per prefill step.
        context_length: the largest number of positions of a cache.
        kv: type of the KV cache.
        weight_streaming: whether weights can stay in host memory.
        operators: number of our plugins in it, by operator.
        linears: what computes the matmuls: "engine" or "plugin" (`--matmul`; stored under this name since format 1).
        attention: "plugin", or "engine" for TensorRT's own.
        seconds: seconds that the build took. Not stored, so that two builds of one bundle are equal.
    """

    file: str
    flavour: Annotated[str, OneOf((FULL, RTX))]
    version: str
    sms: tuple[Annotated[int, Range(10, 999)], ...]
    plugins: Annotated[str, OneOf((LIBRARY, EMBEDDED, PYTHON))]
    max_batch: _Size
    chunk: _Size
    context_length: _Size
    kv: str
    weight_streaming: bool
    operators: dict[str, Count]
    linears: str = "plugin"
    attention: str = "plugin"
    library: str = ""
    seconds: Annotated[float, Range(0)] = dataclasses.field(default=0.0, compare=False)

    def to_json(self) -> str:
        """Return the description as JSON."""
        stored = dataclasses.asdict(self)
        del stored["seconds"]
        return json.dumps({"format": _FORMAT, **stored}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: Path) -> EngineInfo:
        """Parse a description.

        Raises:
            BundleError: it is not a description, or of another version.
        """
        data = require_format(parse(text, where, _ERRORS), "format", _FORMAT, where, _ERRORS)
        return from_data(cls, data, where, _ERRORS, ignored=("format",))

    @property
    def edition(self) -> str:
        """The edition of TensorRT that built it; the same must run it."""
        return self.flavour

    @property
    def needs(self) -> str:
        """The requirements of the device, in words."""
        how = {
            LIBRARY: f"its plugins, {self.library}",
            EMBEDDED: "permission to run the plugins inside it",
            PYTHON: "a build by this version of EdgeLM",
        }
        return f"{TITLES[self.edition]} {self.version} and {how[self.plugins]}"

    @property
    def devices(self) -> str:
        """The compute capabilities in words."""
        return sm_names(self.sms)


def sm_names(sms: Sequence[int]) -> str:
    """Return compute capabilities in words."""
    return ", ".join(f"SM {sm}" for sm in sms)


def engines(bundle: Bundle) -> list[EngineInfo]:
    """The engines of a bundle, in the order of their names.

    Raises:
        BundleError: a description is damaged, or its engine is not in the manifest.
    """
    found = []
    for name in sorted(bundle.manifest.files):
        if name.startswith(f"{FOLDER}/") and name.endswith(".json"):
            path = bundle.file(name)
            info = EngineInfo.from_json(read_bytes(path, _ERRORS), path)
            if info.file not in bundle.manifest.files:
                raise _ERRORS.at(path, f"describes {quoted(info.file)}, which the manifest does not list")
            found.append(info)
    return found


def engine_name(edition: str, sms: tuple[int, ...], version: str) -> str:
    """Return the stem of an engine's file name, e.g. "rtx-1.7.1-sm86-sm89"."""
    short = ".".join(version.split(".")[:3])
    return "-".join(["rtx" if edition == RTX else "trt", short, *(f"sm{sm}" for sm in sms)])


def plugins_in(engine: Path) -> list[PluginSpec]:
    """Return the plugins of an engine without loading it; each once, for any number of profiles.

    Raises:
        BundleError: the file is empty.
        EdgeLMError: a plugin belongs to another version of EdgeLM.
    """
    found: dict[tuple[str, str], PluginSpec] = {}
    if engine.stat().st_size == 0:
        raise BundleError(f"{engine} is empty: run `edgelm build` again")
    with engine.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        mark = MARK.encode()
        place = data.find(mark)
        while place >= 0:
            end = data.find(END.encode(), place, place + _SPEC_LIMIT)
            text = data[place:end].decode("utf-8", "replace")
            # The library inside an engine has the mark too, among its other strings.
            if end >= 0 and "\0" not in text:
                spec = PluginSpec.from_text(text)
                found.setdefault((spec.op, spec.name), spec)
            place = data.find(mark, place + len(mark))
    return list(found.values())


def count_operators(specs: list[PluginSpec]) -> dict[str, int]:
    """Return the number of plugins by operator."""
    return dict(sorted(Counter(spec.op for spec in specs).items()))


def engine_document(info: EngineInfo, bundle: Bundle) -> dict[str, Any]:
    """Return the description for `edgelm inspect --json`."""
    document = dataclasses.asdict(info)
    return document | {"bytes": bundle.manifest.files[info.file].size, "needs": info.needs}


def engine_lines(info: EngineInfo, bundle: Bundle) -> list[str]:
    """Return the lines for `edgelm inspect`: the engine, its requirements, its contents."""
    size = bundle.manifest.files[info.file].size
    held = ", ".join(f"{count} {PREFIX}{op}" for op, count in info.operators.items())
    streaming = "; its weights can stay in host memory (--weight-memory)" if info.weight_streaming else ""
    return [
        f"{info.file}: {info.devices}, {format_size(size)}, built by {info.edition} {info.version}",
        f"needs {info.needs}{streaming}",
        f"up to {info.max_batch} sequences, prefill by {info.chunk}, context {info.context_length}, {info.kv} cache; "
        f"{held or 'no plugin of ours'}; matmuls by the {info.linears}, attention by the {info.attention}",
    ]
