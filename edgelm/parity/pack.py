"""The parity pack: what the reference computed, small enough to travel inside the bundle.

Two references are recorded over the same tokens. The *float reference* has the checkpoint's own weights. The *quantised
reference* does the same PyTorch arithmetic with the bundle's dequantised weights. The distance float - device says what
the bundle lost in all; the distance quantised - device is only what the implementation and the device add.

Positions: all prompts one after the other, each followed by the float reference's greedy continuation without its last
token (a token that is never fed has no logits). N positions in all, L layers, E experts, k chosen.
"""

from __future__ import annotations

import json
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgelm.bundle.kv_cache import KV_TYPES
from edgelm.errors import ParityError
from edgelm.json_dataclass import Count, ErrorFactory, OneOf, Range, from_data, quoted, read_json, require_format
from edgelm.parity.sketch import SKETCH_SEED, SKETCH_WIDTH

FORMAT_VERSION = 1
TOP = 64
PROBES = 64
ARRAYS_FILE = "pack.npz"
INDEX_FILE = "pack.json"
_ERRORS = ErrorFactory(ParityError, "export the bundle again")
# What a pack may unpack to: this, and its file's size times that. Real ones shrink by a tenth.
_UNPACKED_BYTES, _UNPACKED_TIMES = 64 << 20, 16
_PIECE = 1 << 20

_TokenId = Annotated[int, Range(0, 2**31 - 1)]
FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int32]


@dataclass(frozen=True)
class GoldenPrompt:
    """Where one prompt lies in the pack's arrays.

    `decoded` is what the tokenizer reads back from the prompt's ids, `start` its first position, `length` the prompt's
    tokens, `greedy` the float reference's continuation (maybe empty). The positions are `start ... start + fed - 1`.
    """

    name: str
    text: str
    decoded: str
    start: Count
    length: Annotated[int, Range(1, 2**31)]
    greedy: tuple[_TokenId, ...]

    @property
    def fed(self) -> int:
        """How many tokens are fed: the prompt and the continuation without its last token."""
        return self.length + max(len(self.greedy) - 1, 0)

    @property
    def positions(self) -> slice:
        """Its rows in the arrays."""
        return slice(self.start, self.start + self.fed)

    @property
    def greedy_positions(self) -> slice:
        """The positions whose logits choose the greedy tokens, one per token."""
        first = self.start + self.length - 1
        return slice(first, first + len(self.greedy))


@dataclass(frozen=True)
class ReferenceRecord:
    """What one reference computed at N positions. Logits are raw; the true probabilities need `logsumexp`."""

    top_logits: FloatArray  # [N, 64] at the pack's top_ids (the float reference's 64 largest)
    logsumexp: FloatArray  # [N]
    probe_logits: FloatArray  # [N, P] at the pack's probe_ids
    next_logit: FloatArray  # [N] of the next token of the prompt; without meaning where `has_next` is false
    best: IntArray  # [N] this reference's own top-1
    gap: FloatArray  # [N] its top-1 logit minus its second
    norms: FloatArray  # [L + 1, N] of hidden.0 ... hidden.L
    sketches: FloatArray  # [L + 1, N, 64]
    router: FloatArray | None  # [L, N, E] logits
    experts: IntArray | None  # [L, N, k] by falling weight


@dataclass(frozen=True)
class RoundedRecord:
    """Results of the target reference with activations and KV cache rounded as on the device.

    `rows` are the M positions: those of whole prompts, from the first token on. `kv` is the data type of the KV cache.
    The logits are at the same tokens as the target's. `flipped` is 1 where some layer chose other experts.
    """

    rows: IntArray  # [M]
    top_logits: FloatArray  # [M, 64]
    logsumexp: FloatArray  # [M]
    probe_logits: FloatArray  # [M, P]
    next_logit: FloatArray  # [M]
    best: IntArray  # [M]
    flipped: IntArray  # [M]: 1 or 0
    kv: str


Record = ReferenceRecord | RoundedRecord
R = TypeVar("R", ReferenceRecord, RoundedRecord)


@dataclass(frozen=True)
class TokenizerPrint:
    """Identity of a tokenizer: its size and `Tokenizer.fingerprint()`, a hash over the text of every id."""

    vocab_size: Count
    sha256: str


@dataclass(frozen=True)
class _Sketch:
    seed: Count
    width: Annotated[int, Range(SKETCH_WIDTH, SKETCH_WIDTH)]


@dataclass(frozen=True)
class _Array:
    shape: tuple[Annotated[int, Range(0, 2**31)], ...]
    dtype: str


@dataclass(frozen=True)
class _Rounded:
    kv: Annotated[str, OneOf(KV_TYPES)]


@dataclass(frozen=True)
class _Index:
    """`pack.json`."""

    format_version: int
    prompts: tuple[GoldenPrompt, ...]
    tokenizer: TokenizerPrint | None
    sketch: _Sketch
    arrays: dict[str, _Array]
    rounded: _Rounded | None = None
    made_with: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ParityPack:
    """A parity pack in memory.

    `quantized` is None if nothing was quantised: one reference then serves as both. `rounded` is None if the device
    rounds only weights, or rounds in a way that is not simulated, and in packs of older versions.
    """

    prompts: tuple[GoldenPrompt, ...]
    ids: IntArray  # [N]
    top_ids: IntArray  # [N, 64]
    probe_ids: IntArray  # [P]
    reference: ReferenceRecord
    quantized: ReferenceRecord | None
    tokenizer: TokenizerPrint | None
    rounded: RoundedRecord | None = None
    made_with: dict[str, str] = field(default_factory=dict)
    sketch_seed: int = SKETCH_SEED

    @property
    def target(self) -> ReferenceRecord:
        """The reference with the bundle's weights, which the device must reproduce."""
        return self.reference if self.quantized is None else self.quantized

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.reference.norms) - 1

    @property
    def num_experts(self) -> int:
        """E, 0 for a dense model."""
        return 0 if self.reference.router is None else int(self.reference.router.shape[-1])

    @property
    def has_next(self) -> NDArray[np.bool_]:
        """Mask [N]: whether the next token belongs to the prompt. The perplexity is taken over these positions."""
        mask = np.zeros(len(self.ids), dtype=bool)
        for prompt in self.prompts:
            mask[prompt.start : prompt.start + prompt.length - 1] = True
        return mask

    @property
    def next_ids(self) -> IntArray:
        """The token [N] that is fed after each position, 0 if none is."""
        following = np.zeros_like(self.ids)
        for prompt in self.prompts:
            rows = self.ids[prompt.positions]
            following[prompt.start : prompt.start + prompt.fed - 1] = rows[1:]
        return following

    def save(self, folder: Path) -> None:
        """Write pack.npz and pack.json into `folder`, which is created if needed."""
        folder.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, NDArray[Any]] = {"ids": self.ids, "top_ids": self.top_ids, "probe_ids": self.probe_ids}
        records = (("reference", self.reference), ("quantized", self.quantized), ("rounded", self.rounded))
        for prefix, record in records:
            if record is not None:
                for item in fields(record):
                    if item.name == "kv":
                        continue
                    value = getattr(record, item.name)
                    if value is not None:
                        arrays[f"{prefix}.{item.name}"] = value
        with zipfile.ZipFile(folder / ARRAYS_FILE, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for name, array in arrays.items():
                # A fixed date, so that the same checkpoint gives the same bytes.
                entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
                entry.compress_type = zipfile.ZIP_DEFLATED
                with archive.open(entry, "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)
        index = {
            "format_version": FORMAT_VERSION,
            "prompts": [asdict(prompt) for prompt in self.prompts],
            "tokenizer": None if self.tokenizer is None else asdict(self.tokenizer),
            "sketch": {"seed": self.sketch_seed, "width": SKETCH_WIDTH},
            "arrays": {name: {"shape": list(array.shape), "dtype": array.dtype.name} for name, array in arrays.items()},
            "made_with": self.made_with,
        }
        if self.rounded is not None:
            index["rounded"] = {"kv": self.rounded.kv}
        text = json.dumps(index, indent=1, ensure_ascii=False) + "\n"
        (folder / INDEX_FILE).write_text(text, encoding="utf-8", newline="\n")

    @classmethod
    def load(cls, folder: Path) -> ParityPack:
        """Read a pack.

        Raises:
            ParityError: a file is missing, damaged, of a newer format, or its arrays do not fit together.
        """
        path = folder / INDEX_FILE
        if not path.exists():
            raise ParityError(f"{path} is missing: the bundle has no parity pack; export it again")
        data = require_format(read_json(path, _ERRORS), "format_version", FORMAT_VERSION, path, _ERRORS)
        index = from_data(_Index, data, path, _ERRORS)
        arrays = _read_arrays(folder / ARRAYS_FILE, index.arrays)
        for name in ("ids", "top_ids", "probe_ids"):
            if name not in arrays:
                raise _ERRORS.at(path, f"arrays.{name} is missing")
        has_quantized = any(name.startswith("quantized.") for name in arrays)
        pack = cls(
            prompts=index.prompts,
            ids=arrays["ids"],
            top_ids=arrays["top_ids"],
            probe_ids=arrays["probe_ids"],
            reference=_record(ReferenceRecord, arrays, "reference", path),
            quantized=_record(ReferenceRecord, arrays, "quantized", path) if has_quantized else None,
            tokenizer=index.tokenizer,
            rounded=None
            if index.rounded is None
            else _record(RoundedRecord, arrays, "rounded", path, index.rounded.kv),
            made_with=index.made_with,
            sketch_seed=index.sketch.seed,
        )
        pack.check(folder)
        return pack

    def check(self, where: Path) -> None:
        """Raise ParityError unless prompts and arrays agree with each other in number, shape and range."""
        problem = next(self._problems(), None)
        if problem is not None:
            raise _ERRORS.at(where, problem)

    def _problems(self) -> Iterator[str]:
        """Yield each inconsistency; after the first, the others may be consequences of it."""
        if (self.ids.ndim, self.top_ids.ndim, self.probe_ids.ndim, self.reference.norms.ndim) != (1, 2, 1, 2):
            yield "ids, top_ids, probe_ids or reference.norms have another number of dimensions than 1, 2, 1 and 2"
        count, layers = len(self.ids), self.num_layers
        if not self.prompts or sum(prompt.fed for prompt in self.prompts) != count:
            yield f"the prompts do not add up to its {count} positions"
        start = 0
        for prompt in self.prompts:
            if prompt.start != start or prompt.length < 1:
                yield f"prompt {quoted(prompt.name)} is misplaced"
            start += prompt.fed
        top, probes = self.top_ids.shape[-1], len(self.probe_ids)
        if min(top, probes, layers) < 1 or self.top_ids.shape[0] != count:
            yield f"top_ids has shape {self.top_ids.shape}, with {probes} probe_ids and {layers} layers"
        for name, ids in (("ids", self.ids), ("top_ids", self.top_ids), ("probe_ids", self.probe_ids)):
            if int(ids.min()) < 0:
                yield f"{name} holds the token id {int(ids.min())}"
        for name, record in (("reference", self.reference), ("quantized", self.quantized)):
            if record is not None:
                yield from self._record_problems(name, record, top, probes)
        if self.rounded is not None:
            yield from self._rounded_problems(self.rounded, top, probes)

    def _record_problems(self, name: str, record: ReferenceRecord, top: int, probes: int) -> Iterator[str]:
        count, layers = len(self.ids), self.num_layers
        expected: dict[str, tuple[int, ...]] = {
            "gap": (count,),
            "norms": (layers + 1, count),
            "sketches": (layers + 1, count, SKETCH_WIDTH),
        }
        if (record.router is None) != (record.experts is None) or (record.router is None) != (self.num_experts == 0):
            yield f"{name} has one of router and experts, or another than the reference"
        if record.router is not None and record.experts is not None:
            expected["router"] = (layers, count, self.num_experts)
            expected["experts"] = (layers, count, record.experts.shape[-1] if record.experts.ndim else 0)
        yield from _array_problems(name, record, (count, top, probes), expected)
        if int(record.best.min()) < 0:
            yield f"{name}.best holds the token id {int(record.best.min())}"
        chosen = record.experts
        if chosen is not None and not (chosen.size and 0 <= int(chosen.min()) <= int(chosen.max()) < self.num_experts):
            yield f"{name}.experts holds an expert outside 0..{self.num_experts - 1}"

    def _rounded_problems(self, record: RoundedRecord, top: int, probes: int) -> Iterator[str]:
        count = record.rows.size
        if record.rows.ndim != 1 or not count or record.rows.min() < 0 or record.rows.max() >= len(self.ids):
            yield "rounded.rows are not positions of the pack"
        yield from _array_problems("rounded", record, (count, top, probes), {"flipped": (count,)})


def _array_problems(
    name: str, record: Record, sizes: tuple[int, int, int], more: Mapping[str, tuple[int, ...]]
) -> Iterator[str]:
    """Yield the problems of a record's arrays; `sizes` is (positions, tokens, probes), `more` has further shapes."""
    count, top, probes = sizes
    common: dict[str, tuple[int, ...]] = {"top_logits": (count, top), "probe_logits": (count, probes)}
    common |= dict.fromkeys(("logsumexp", "next_logit", "best"), (count,))
    for item, shape in {**common, **more}.items():
        array = getattr(record, item)
        if array.shape != shape:
            yield f"{name}.{item} has shape {array.shape}, expected {shape}"
        if array.dtype == np.float32 and not np.isfinite(array).all():
            yield f"{name}.{item} has values that are not finite"


def _read_arrays(path: Path, wanted: Mapping[str, _Array]) -> dict[str, NDArray[Any]]:
    """Read the arrays that the index lists. Sizes, shapes and types are checked before memory is allocated."""
    sizes = {name: math.prod(info.shape) * _dtype(name).itemsize for name, info in wanted.items()}
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(sizes.values()) > _UNPACKED_BYTES + _UNPACKED_TIMES * path.stat().st_size:
                raise _ERRORS.at(path, f"unpacks to {sum(sizes.values())} bytes, too many for its size")
            return {name: _read_array(archive, path, name, info) for name, info in wanted.items()}
    except KeyError as error:
        raise _ERRORS.at(path, f"has no array {error}") from error
    # zipfile raises the last two for unknown compression or encryption.
    except (
        OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, struct.error, RuntimeError, NotImplementedError
    ) as error:  # fmt: skip
        raise _ERRORS.at(path, f"cannot be read ({error})") from error


def _read_array(archive: zipfile.ZipFile, path: Path, name: str, wanted: _Array) -> NDArray[Any]:
    entry = archive.getinfo(f"{name}.npy")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"compression of kind {entry.compress_type}")
    with archive.open(entry) as stream:
        version = np.lib.format.read_magic(stream)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, by_columns, dtype = read_header(stream)
        if (shape, dtype.name) != (wanted.shape, wanted.dtype) or dtype != _dtype(name) or by_columns:
            raise _ERRORS.at(path, f"array {name!r} is not what {INDEX_FILE} says")
        size = math.prod(shape) * dtype.itemsize
        data = bytearray()
        while len(data) < size:
            piece = stream.read(min(size - len(data), _PIECE))
            if not piece:
                raise EOFError(f"array {name!r} ends early")
            data += piece
        if stream.read(1):  # reading to the end also checks the checksum
            raise EOFError(f"array {name!r} is longer than its header says")
    return np.frombuffer(data, dtype).reshape(shape)


def _dtype(name: str) -> np.dtype[Any]:
    """Return the data type of an array of the archive."""
    return np.dtype(np.int32 if name.rpartition(".")[2] in _IDS else np.float32)


_IDS = {"ids", "top_ids", "probe_ids"} | {
    item.name for record in (ReferenceRecord, RoundedRecord) for item in fields(record) if "Int" in str(item.type)
}


def _record(cls: type[R], arrays: Mapping[str, NDArray[Any]], prefix: str, where: Path, kv: str | None = None) -> R:
    """Return the record of the arrays with a prefix; `kv` is its one field that is not an array."""
    values: dict[str, Any] = {} if kv is None else {"kv": kv}
    for item in fields(cls):
        if item.name not in values:
            values[item.name] = arrays.get(f"{prefix}.{item.name}")
            if values[item.name] is None and "None" not in str(item.type):
                raise _ERRORS.at(where, f"arrays.{prefix}.{item.name} is missing")
    return cls(**values)
