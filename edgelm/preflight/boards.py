"""Boards that one may not have yet: their figures (boards.toml) and the speed that these let expect."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from edgelm.errors import EdgeLMError
from edgelm.json_dataclass import ErrorFactory, parse_toml
from edgelm.preflight.planned import Planned
from edgelm.preflight.predict import CALL_SECONDS, NODE_SECONDS, Prediction, Range, nodes, operations, read_bytes

TABLE = Path(__file__).parent / "boards.toml"
_ERRORS = ErrorFactory(EdgeLMError, "install edgelm again")
_GIB = 1 << 30

PREFILL_SHARE = Range(0.35, 0.2, 0.5)
"""Share of the cores' int8 peak that a whole model's prefill reaches with our kernels: 0.23 to 0.39 on a Xeon with
AVX-512 VNNI (computed peak 1,434 GOPS), 0.5 to 0.57 on a Zen 5 (measured peak 2,012); see docs/devices/predict.md."""
_READ_SPREAD = 0.2
"""Half width of a predicted range of decoding, as a share."""
_SLOWER_CALLS = 3
"""How many times longer than on the reference CPU a call of the runtime takes on a board's core."""

# docs/gpu/decode-cost.md: a launch without its reads, and launches of a layer.
_LAUNCH_SECONDS = 2.7e-6
_LAUNCHES = {"dense": 5, "moe": 7, "model": 4}
_GPU_SPREAD = 0.25


@dataclass(frozen=True)
class Board:
    """A board or device, with the published and the computed figures that a prediction needs.

    Attributes:
        name: the value of `--for`.
        title: its name for people.
        memory: bytes of memory.
        kept: bytes of it that the system keeps.
        bandwidth: bytes per second of the memory, as published.
        read: share of the bandwidth that reads of weights reach.
        target: what bundles for it are exported for: "cpu" or "tensorrt".
        source: where the figures are from.
        cores: fast cores.
        ghz: their clock when all work.
        ops: int8 operations of a core and cycle; None where its kernels have no known speed.
        isa: which of our kernels it runs.
        sm: compute capability of its GPU.
    """

    name: str
    title: str
    memory: int
    kept: int
    bandwidth: float
    read: float
    target: str
    source: str
    cores: int
    ghz: float
    ops: int | None
    isa: str
    sm: int | None

    @property
    def available(self) -> int:
        """Bytes of memory for a bundle."""
        return self.memory - self.kept

    @property
    def peak(self) -> float | None:
        """Int8 operations per second of all its fast cores; None where they are not known."""
        return None if self.ops is None else self.cores * self.ghz * 1e9 * self.ops


@cache
def boards() -> dict[str, Board]:
    """Return the table of boards by name."""
    table = parse_toml(TABLE.read_bytes(), TABLE, _ERRORS)
    return {name: _board(name, {**table.get(entry.get("like", ""), {}), **entry}) for name, entry in table.items()}


def _board(name: str, entry: dict[str, Any]) -> Board:
    return Board(
        name=name,
        title=entry["title"],
        memory=int(entry["memory"] * _GIB),
        kept=int(entry["kept"] * _GIB),
        bandwidth=entry["bandwidth"] * 1e9,
        read=entry["read"],
        target=entry.get("target", "cpu"),
        source=entry["source"],
        cores=entry.get("cores", 0),
        ghz=entry.get("ghz", 0.0),
        ops=entry.get("ops"),
        isa=entry.get("isa", ""),
        sm=entry.get("sm"),
    )


def board(name: str) -> Board:
    """Return a board by its name, or by a shorter one that several sizes share, such as "pi5": the largest of them.

    Raises:
        EdgeLMError: there is no such board; lists those that there are.
    """
    known, name = boards(), name.lower()
    if name in known:
        return known[name]
    sizes = [
        one for key, one in known.items() if key.startswith(f"{name}-") and key.removeprefix(f"{name}-")[0].isdigit()
    ]
    if not sizes:
        raise EdgeLMError(f"there is no board {name!r} in the table: give one of {', '.join(known)}")
    return max(sizes, key=lambda one: one.memory)


def predict_for(
    planned: Planned, on: Board, *, prompt_tokens: int, new_tokens: int, kv: str | None = None
) -> Prediction:
    """Predict the speed of a planned bundle on a board, from its published figures alone.

    Raises:
        EdgeLMError: the bundle is not for such a board.
    """
    if planned.target != on.target:
        raise EdgeLMError(f"{on.title} takes bundles for {on.target}, not for {planned.target}")
    kv = kv or planned.kv
    reads = read_bytes(planned, kv, prompt_tokens + new_tokens / 2)
    reading = reads / (on.bandwidth * on.read)
    work = operations(planned, prompt_tokens)
    notes = [f"predicted from published figures, nothing was run on a {on.title}"]
    if on.target == "cpu":
        calls = _SLOWER_CALLS * (CALL_SECONDS + NODE_SECONDS * nodes(planned))
        spread = _READ_SPREAD
        if planned.ops != "native":
            notes.append(
                "portable operators are slower than memory allows: decode is an upper limit, prefill not known"
            )
        elif on.peak is None:
            notes.append(f"decode is an upper limit and prefill not known: our {on.isa} kernels were not timed")
    else:
        kind = "moe" if planned.info.num_experts else "dense"
        calls = _LAUNCH_SECONDS * (_LAUNCHES[kind] * planned.info.num_layers + _LAUNCHES["model"])
        spread = _GPU_SPREAD
        notes.append("prefill: not known, no GPU has run our kernels")
    decode = Range(1 / (reading + calls), 1 / (reading * (1 + spread) + calls), 1 / (reading * (1 - spread) + calls))
    prefill = first = None
    if on.peak is not None and on.target == "cpu" and planned.ops == "native":
        rates = [on.peak * share / work for share in (PREFILL_SHARE.value, PREFILL_SHARE.low, PREFILL_SHARE.high)]
        prefill = Range(*rates)
        first = Range(prompt_tokens / rates[0], prompt_tokens / rates[2], prompt_tokens / rates[1])
    return Prediction(
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        threads=on.cores,
        kv=kv,
        prefill=prefill,
        decode=decode,
        first_token=first,
        bytes_per_token=reads,
        read_bandwidth=on.bandwidth * on.read,
        operations=work,
        throughput=None if prefill is None else prefill.value * work,
        parts={"decode": {"reading": reading, "calls": calls}},
        source=on.title,
        notes=tuple(notes),
    )
