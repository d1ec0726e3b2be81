"""The parity pack: what the reference computed, small enough to travel inside the bundle.

Two references are recorded over the same tokens. The *float reference* has the checkpoint's own weights. The *quantised
reference* does the same PyTorch arithmetic with the bundle's dequantised weights. The distance float - device says what
the bundle lost in all; the distance quantised - device is only what the implementation and the device add.

Positions: all prompts one after the other, each followed by the float reference's greedy continuation without its last
token (a token that is never fed has no logits). N positions in all, L layers, E experts, k chosen.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import ParityError
from edgelm.parity.sketch import SKETCH_SEED, SKETCH_WIDTH

FORMAT_VERSION = 1
TOP = 64
PROBES = 64
ARRAYS_FILE = "pack.npz"
INDEX_FILE = "pack.json"

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
    start: int
    length: int
    greedy: tuple[int, ...]

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
class TokenizerPrint:
    """What identifies a tokenizer: its size and `Tokenizer.fingerprint()`, a hash over what every id stands for."""

    vocab_size: int
    sha256: str


@dataclass(frozen=True)
class ParityPack:
    """A whole pack in memory. `quantized` is None where nothing was quantised: one reference then serves as both."""

    prompts: tuple[GoldenPrompt, ...]
    ids: IntArray  # [N]
    top_ids: IntArray  # [N, 64]
    probe_ids: IntArray  # [P]
    reference: ReferenceRecord
    quantized: ReferenceRecord | None
    tokenizer: TokenizerPrint | None
    made_with: dict[str, str] = field(default_factory=dict)
    sketch_seed: int = SKETCH_SEED

    @property
    def target(self) -> ReferenceRecord:
        """The reference whose weights are the bundle's: what the device must reproduce."""
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
        """[N]: whether the next token is text of the prompt (the perplexity is taken over these positions)."""
        mask = np.zeros(len(self.ids), dtype=bool)
        for prompt in self.prompts:
            mask[prompt.start : prompt.start + prompt.length - 1] = True
        return mask

    @property
    def next_ids(self) -> IntArray:
        """[N]: the token fed after each position, 0 where none is."""
        following = np.zeros_like(self.ids)
        for prompt in self.prompts:
            rows = self.ids[prompt.positions]
            following[prompt.start : prompt.start + prompt.fed - 1] = rows[1:]
        return following

    def save(self, folder: Path) -> None:
        """Write pack.npz and pack.json into `folder`, which is made when absent."""
        folder.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, NDArray[Any]] = {"ids": self.ids, "top_ids": self.top_ids, "probe_ids": self.probe_ids}
        for prefix, record in (("reference", self.reference), ("quantized", self.quantized)):
            if record is not None:
                for item in fields(ReferenceRecord):
                    value = getattr(record, item.name)
                    if value is not None:
                        arrays[f"{prefix}.{item.name}"] = value
        with zipfile.ZipFile(folder / ARRAYS_FILE, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for name, array in arrays.items():
                # A fixed date: the same checkpoint must give the same bytes.
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
        text = json.dumps(index, indent=1, ensure_ascii=False) + "\n"
        (folder / INDEX_FILE).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> ParityPack:
        """Read a pack.

        Raises:
            ParityError: a file is missing, damaged, of a newer format, or its arrays do not fit together.
        """
        index = _read_index(folder / INDEX_FILE)
        arrays = _read_arrays(folder / ARRAYS_FILE, index)
        try:
            prompts = tuple(
                GoldenPrompt(
                    str(item["name"]),
                    str(item["text"]),
                    str(item["decoded"]),
                    int(item["start"]),
                    int(item["length"]),
                    tuple(int(token) for token in item["greedy"]),
                )
                for item in index["prompts"]
            )
            tokenizer = None
            if index["tokenizer"] is not None:
                tokenizer = TokenizerPrint(int(index["tokenizer"]["vocab_size"]), str(index["tokenizer"]["sha256"]))
            has_quantized = any(name.startswith("quantized.") for name in arrays)
            pack = cls(
                prompts=prompts,
                ids=arrays["ids"],
                top_ids=arrays["top_ids"],
                probe_ids=arrays["probe_ids"],
                reference=_record(arrays, "reference"),
                quantized=_record(arrays, "quantized") if has_quantized else None,
                tokenizer=tokenizer,
                made_with={str(key): str(value) for key, value in index.get("made_with", {}).items()},
                sketch_seed=int(index["sketch"]["seed"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ParityError(f"{folder / INDEX_FILE} lacks or garbles {error}: export the bundle again") from error
        pack.check(folder)
        return pack

    def check(self, where: Path) -> None:
        """Raise ParityError unless prompts and arrays agree with each other in number and shape."""
        count, layers = len(self.ids), self.num_layers
        if not self.prompts or sum(prompt.fed for prompt in self.prompts) != count:
            raise ParityError(f"the prompts of {where} do not add up to its {count} positions: export the bundle again")
        start = 0
        for prompt in self.prompts:
            if prompt.start != start or prompt.length < 1:
                raise ParityError(f"prompt {prompt.name!r} of {where} is misplaced: export the bundle again")
            start += prompt.fed
        top, probes = self.top_ids.shape[-1], len(self.probe_ids)
        for name, record in (("reference", self.reference), ("quantized", self.quantized)):
            if record is None:
                continue
            expected: dict[str, tuple[int, ...]] = {
                "top_logits": (count, top),
                "logsumexp": (count,),
                "probe_logits": (count, probes),
                "next_logit": (count,),
                "best": (count,),
                "gap": (count,),
                "norms": (layers + 1, count),
                "sketches": (layers + 1, count, SKETCH_WIDTH),
            }
            if record.router is not None and record.experts is not None:
                expected["router"] = (layers, count, self.num_experts)
                expected["experts"] = (layers, count, record.experts.shape[-1])
            for item, shape in expected.items():
                actual = getattr(record, item).shape
                if actual != shape:
                    raise ParityError(f"{name}.{item} of {where} has shape {actual}, expected {shape}")


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ParityError(f"{path} is missing: the bundle carries no parity pack; export it with one") from error
    except (OSError, ValueError) as error:
        raise ParityError(f"{path} cannot be read ({error}): export the bundle again") from error
    version = index.get("format_version") if isinstance(index, dict) else None
    if version != FORMAT_VERSION:
        raise ParityError(f"{path} has format version {version}, this EdgeLM reads {FORMAT_VERSION}: update EdgeLM")
    assert isinstance(index, dict)
    return index


def _read_arrays(path: Path, index: dict[str, Any]) -> dict[str, NDArray[Any]]:
    arrays: dict[str, NDArray[Any]] = {}
    try:
        # Opened here: np.load leaves the file open when it is no archive.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            for name, info in index["arrays"].items():
                arrays[name] = archive[name]
                if list(arrays[name].shape) != info["shape"] or arrays[name].dtype.name != info["dtype"]:
                    raise ParityError(
                        f"array {name!r} of {path} is not what {INDEX_FILE} says: export the bundle again"
                    )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ParityError(f"{path} cannot be read ({error}): export the bundle again") from error
    return arrays


def _record(arrays: dict[str, NDArray[Any]], prefix: str) -> ReferenceRecord:
    optional = {"router", "experts"}
    values = {
        item.name: arrays.get(f"{prefix}.{item.name}") if item.name in optional else arrays[f"{prefix}.{item.name}"]
        for item in fields(ReferenceRecord)
    }
    return ReferenceRecord(**values)  # type: ignore[arg-type]  # keyed by the class's own fields
