"""Predict the speed of a planned bundle on this CPU: time the kernels on the model's own shapes for about two seconds.

A part of the model is rebuilt from its shapes: for decoding, a fraction of the layers whose weights exceed the caches;
for prefill, one layer with a chunk of the prompt. Its operations run one after another as in the model. The time of a
token or of a prompt is the sum of the operations' times, each times its number in the model, plus what a call of the
runtime costs besides. docs/devices/predict.md has the formulas.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from edgelm import devices
from edgelm.bundle.cpu_layout import RESCORE, TILE, Kind
from edgelm.bundle.reads import bytes_per_token
from edgelm.errors import EdgeLMError
from edgelm.preflight.planned import Matmul, Planned
from edgelm.runtimes.base import DEFAULT_CHUNK
from edgelm.runtimes.onnxruntime.measure import AttentionWork, MatmulWork, Measurement, Work

NODE_SECONDS = 4e-6
"""Cost of an operator in ONNX Runtime besides its kernel, on the CPU that docs/devices/predict.md names."""
CALL_SECONDS = 60e-6
"""Cost of a call of the session, from Python and back."""
_NODES = {"layer": 5, "model": 4}
"""Operators of a layer (qkv, attention, o, gate and up, down), and besides: embedding, slice, norm, head."""
_REPLICA_BYTES = 256 << 20
_EXPERTS = 16
"""Experts of a layer that are timed."""
_HEAD_ROWS = 1 << 15
_LEAST_SHARE = 0.125
SECONDS = 0.5


@dataclass(frozen=True)
class Range:
    """A prediction with the range that it may fall in."""

    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        """Return the fields for a JSON document."""
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Phase:
    """Predicted time of a prompt or of a token.

    Attributes:
        seconds: the time.
        parts: seconds by part: "attention", "experts", "head", "other matmuls", "calls".
    """

    seconds: Range
    parts: dict[str, float]


@dataclass(frozen=True)
class Prediction:
    """Predicted speed of a bundle, in tokens per second.

    Attributes:
        prompt_tokens, new_tokens: what it is for, as `edgelm bench`.
        threads: CPU threads.
        kv: type of the KV cache.
        prefill, decode: tokens per second. Prefill is None where it is not known.
        first_token: seconds until the first token; None likewise.
        bytes_per_token: bytes that decoding a token reads.
        read_bandwidth: bytes per second that these reads amount to.
        operations: multiply-adds of a prompt token, times two.
        throughput: operations per second of prefill; None where it is not known.
        parts: seconds by phase and part.
        source: how it was found: "measured here" or the board's name.
        notes: what the prediction does not know.
    """

    prompt_tokens: int
    new_tokens: int
    threads: int
    kv: str
    prefill: Range | None
    decode: Range
    first_token: Range | None
    bytes_per_token: int
    read_bandwidth: float
    operations: int
    throughput: float | None
    parts: dict[str, dict[str, float]]
    source: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Share:
    """Works of the replica, and how much of the model's time one pass over them stands for: factor by part."""

    work: Work
    part: str
    factor: float


def read_bytes(planned: Planned, kv: str, position: float) -> int:
    """Return the bytes that decoding a token at `position` reads."""
    return bytes_per_token(planned.tensors.items(), planned.info, kv, planned.ops, position)


def operations(planned: Planned, tokens: int) -> int:
    """Return the operations (two per multiply-add) of a token of a prompt of `tokens`, without the head."""
    matrices = 0.0
    for matrix in planned.decoder.matrices.values():
        if matrix.layer is not None:
            share = planned.info.experts_per_token / planned.info.num_experts if matrix.expert is not None else 1.0
            matrices += matrix.rows * matrix.columns * share
    info = planned.info
    attention = info.num_layers * info.num_heads * info.head_dim * tokens  # half of the pairs, scores and sums
    return round(2 * (matrices + attention))


def predict(
    planned: Planned,
    *,
    prompt_tokens: int,
    new_tokens: int,
    kv: str | None = None,
    threads: int | None = None,
    seconds: float = SECONDS,
    experts_used: float = 1.0,
) -> Prediction:
    """Predict the speed of a native bundle on this CPU.

    Args:
        planned: the bundle.
        prompt_tokens, new_tokens: as `edgelm bench`.
        kv: type of the KV cache; None for the bundle's own.
        threads: CPU threads; None for the physical cores that this process may use.
        seconds: time to measure each of the two phases for.
        experts_used: share of a layer's experts that a chunk of the prompt reaches. Trained routers reach nearly all;
            those of random weights prefer some, so that these have more rows.

    Raises:
        RuntimeUnavailableError: this installation has no compiled operators.
        EdgeLMError: the bundle has no native operators, or memory is too small for the measurement.
    """
    if planned.ops != "native":
        raise EdgeLMError(f"the speed of {planned.ops} operators cannot be measured before the bundle exists")
    kv, threads = kv or planned.kv, threads or devices.allowed_cores()
    prefill = _phase(
        planned, _prefill(planned, kv, prompt_tokens, experts_used), threads, seconds, _chunks(prompt_tokens)
    )
    position = prompt_tokens + new_tokens / 2
    decode = _phase(planned, _decode(planned, kv, round(position)), threads, seconds, 1)
    head = decode.parts.get("head", 0.0)
    first = _shifted(prefill.seconds, head)
    reads, work = read_bytes(planned, kv, position), operations(planned, prompt_tokens)
    return Prediction(
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        threads=threads,
        kv=kv,
        prefill=_rate(prompt_tokens, first),
        decode=_rate(1, decode.seconds),
        first_token=first,
        bytes_per_token=reads,
        read_bandwidth=reads / decode.seconds.value,
        operations=work,
        throughput=work * prompt_tokens / first.value,
        parts={"prefill": {**prefill.parts, "head": head}, "decode": decode.parts},
        source="measured here",
    )


def nodes(planned: Planned) -> int:
    """Return the number of operators of a native graph, about."""
    return _NODES["layer"] * planned.info.num_layers + _NODES["model"]


def _shifted(seconds: Range, by: float) -> Range:
    return Range(seconds.value + by, seconds.low + by, seconds.high + by)


def _rate(tokens: int, seconds: Range) -> Range:
    return Range(tokens / seconds.value, tokens / seconds.high, tokens / seconds.low)


def _chunks(prompt_tokens: int) -> int:
    return -(-prompt_tokens // DEFAULT_CHUNK)


def _phase(planned: Planned, shares: Sequence[_Share], threads: int, seconds: float, calls: int) -> Phase:
    """Time the works of a phase and scale them to the whole model."""
    passes = Measurement([share.work for share in shares], threads).run(seconds)
    times = [sum(time * share.factor for time, share in zip(one, shares, strict=True)) for one in passes]
    parts: dict[str, float] = {}
    for share, column in zip(shares, zip(*passes, strict=True), strict=True):
        parts[share.part] = parts.get(share.part, 0.0) + share.factor * statistics.median(column)
    parts["calls"] = calls * (CALL_SECONDS + NODE_SECONDS * nodes(planned))
    total = sum(parts.values())
    low, high = (value + parts["calls"] for value in (_quantile(times, 0.1), _quantile(times, 0.9)))
    return Phase(Range(total, min(low, total), max(high, total)), parts)


def _quantile(values: Sequence[float], at: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(at * (len(ordered) - 1)))]


def _part(matmul: Matmul) -> str:
    if matmul.part in ("head", "router"):
        return matmul.part
    return "experts" if matmul.count > 1 else "other matmuls"


def _shapes(planned: Planned) -> dict[Matmul, int]:
    """Return the distinct matmuls of the layers and in how many layers each is."""
    found: dict[Matmul, int] = {}
    for matmul in planned.matmuls:
        alike = replace(matmul, layer=None)
        found[alike] = found.get(alike, 0) + 1
    return found


def _attention(planned: Planned, kv: str, past: int, tokens: int) -> AttentionWork:
    info = planned.info
    return AttentionWork(kv, info.num_heads, info.num_kv_heads, info.head_dim, past, tokens)


def _prefill(planned: Planned, kv: str, prompt_tokens: int, experts_used: float) -> list[_Share]:
    """Return the works of one layer for a chunk of the prompt, with the factors for all layers and chunks."""
    chunk = min(prompt_tokens, DEFAULT_CHUNK)
    chunks = prompt_tokens / chunk
    found = []
    for matmul, layers in _shapes(planned).items():
        if matmul.part == "head":
            continue  # one row: counted with decoding
        reached = max(matmul.active, round(matmul.count * experts_used))
        used = min(reached, _EXPERTS)
        rows = max(1, round(chunk * matmul.active / reached))
        work = MatmulWork(matmul.matrix, rows, used, int8=matmul.int8)
        found.append(_Share(work, _part(matmul), chunks * layers * reached / used))
        if matmul.part == "qkv":
            attention = _attention(planned, kv, max(0, prompt_tokens - chunk) // 2, chunk)
            found.append(_Share(attention, "attention", chunks * layers))
    return found


def _decode(planned: Planned, kv: str, position: int) -> list[_Share]:
    """Return the works of some layers for one token, with the factors for all layers."""
    shapes = {matmul: layers for matmul, layers in _shapes(planned).items() if matmul.part != "head"}
    heads = [matmul for matmul in planned.matmuls if matmul.part == "head"]
    total = sum(layers * matmul.active * matmul.matrix.nbytes for matmul, layers in shapes.items())
    available = devices.describe().memory_available
    limit = _REPLICA_BYTES if available is None else min(_REPLICA_BYTES, available // 8)
    copies = max(1, min(planned.info.num_layers, round(planned.info.num_layers * limit / total)))
    found = []
    for copy in range(copies):
        for matmul, layers in shapes.items():
            # A shape that few layers have is timed in as many copies as its share asks for, at least one.
            wanted = max(1, round(copies * layers / planned.info.num_layers))
            if copy >= wanted:
                continue
            work = MatmulWork(matmul.matrix, 1, matmul.active, int8=matmul.int8)
            found.append(_Share(work, _part(matmul), layers / wanted))
            if matmul.part == "qkv":
                work_of_cache = _attention(planned, kv, position, 1)
                found.append(_Share(work_of_cache, "attention", layers / wanted))
    return [*found, *(_head(matmul) for matmul in heads)]


def _head(matmul: Matmul) -> _Share:
    """Return the work of a part of the head's rows, with the factor for all of them and for those rescored."""
    whole = matmul.matrix
    rows = min(whole.rows, _HEAD_ROWS)
    matrix = replace(whole, rows=rows)
    factor = whole.rows / rows
    split = whole.kind is Kind.INT8_SPLIT
    if split:
        matrix = matrix.with_low_offset(matrix.first_bytes)
        factor *= 1 + 2 * min(1.0, RESCORE * TILE / whole.rows)
    return _Share(MatmulWork(matrix, 1, high_only=split, int8=matmul.int8), "head", factor)
