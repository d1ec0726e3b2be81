"""What an evaluation found, as plain data."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from edgelm.parity.result import json_ready

FORMAT, FORMAT_VERSION = "edgelm-evaluation", 1
BUNDLE, CHECKPOINT, RECIPE = "bundle", "checkpoint", "recipe"


@dataclass(frozen=True)
class Estimate:
    """A mean over windows and its standard error."""

    mean: float
    standard_error: float


@dataclass(frozen=True)
class Divergence:
    """KL(float || target) in nats a token: mean with its standard error over windows, median and 99th percentile.

    `top1`: share of tokens at which both find the same token most likely.
    """

    mean: float
    standard_error: float
    median: float
    p99: float
    top1: float


@dataclass(frozen=True)
class Speed:
    """Tokens a second and bytes of a short run in a process of its own; memory is None where the system hides it."""

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    peak_memory: int | None
    prompt_tokens: int
    new_tokens: int
    threads: int
    load_average: float | None


@dataclass(frozen=True)
class LayerError:
    """The residual stream after a layer (-1: the embedding) against the float model's.

    `error`: |target - float| / |float|, median over tokens, from sketches of 64 numbers. `same_experts`: share of
    tokens for which the router chose the same experts; None for the embedding and for dense models.
    """

    layer: int
    error: float
    same_experts: float | None


@dataclass(frozen=True)
class ExpertError:
    """Relative squared error of one expert's output on the float model's inputs, and how many these were."""

    layer: int
    expert: int
    error: float
    tokens: int


@dataclass(frozen=True)
class ExpertErrors:
    """Of every expert: |y - y_float|^2 / |y_float|^2 summed over the tokens that the float model gave it.

    `error` [L][E], None where it got no token; `worst`: the largest, in falling order.
    """

    error: tuple[tuple[float | None, ...], ...]
    worst: tuple[ExpertError, ...]


@dataclass(frozen=True)
class TargetResult:
    """One target, with one type of cache.

    Attributes:
        name: as it is called in tables: what was asked for, and the cache's type where several were.
        target: what was asked for.
        kind: "bundle", "checkpoint" or "recipe".
        recipe: the recipe's name.
        arithmetic: what computed.
        kv: type of the cache, of bundles.
        stored_bytes: of the weights.
        bits_per_weight: None where the number of weights is not known (bundles without a float checkpoint).
        loss: mean -log p(next token) in nats.
        perplexity: exp of it.
        kl: None without a float model.
        kv_loss: KL minus the KL with a float32 cache, the same windows of both; None where that was not measured.
        speed: of bundles.
        layers: where asked for.
        experts: where asked for, of MoE models; None for bundles.
        files: size and SHA-256 of what was measured.
        notes: what is to be known to read the numbers.
    """

    name: str
    target: str
    kind: str
    recipe: str | None
    arithmetic: str
    kv: str | None
    stored_bytes: int
    bits_per_weight: float | None
    loss: Estimate
    perplexity: float
    kl: Divergence | None = None
    kv_loss: Estimate | None = None
    speed: Speed | None = None
    layers: tuple[LayerError, ...] | None = None
    experts: ExpertErrors | None = None
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class TextResult:
    """What was read: tokens = windows x length. The token after each is predicted, the last window's last too."""

    name: str
    sha256: str
    windows: int
    length: int
    tokens: int


@dataclass(frozen=True)
class ReferenceResult:
    """The float model. `expert_tokens` [L][E]: how many tokens each expert got; None for dense models."""

    checkpoint: str
    stored_bytes: int
    weights: int
    loss: Estimate
    perplexity: float
    expert_tokens: tuple[tuple[int, ...], ...] | None
    files: dict[str, dict[str, Any]]

    @property
    def bits_per_weight(self) -> float:
        """As it is stored."""
        return 8 * self.stored_bytes / self.weights


@dataclass(frozen=True)
class EvaluationReport:
    """Everything that was measured."""

    model: str
    text: TextResult
    reference: ReferenceResult | None
    targets: tuple[TargetResult, ...]
    device: dict[str, Any]
    versions: dict[str, str]
    created: str
    seconds: float
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; numbers that are not finite become null, which JSON has no other word for."""
        document: dict[str, Any] = {"format": FORMAT, "format_version": FORMAT_VERSION, **json_ready(asdict(self))}
        return document

    def to_json(self) -> str:
        """One JSON document."""
        return json.dumps(self.to_dict(), allow_nan=False)


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which points (size, loss) no other beats in both, by rising size: the lower left edge.

    Of equal points the first counts.
    """
    found: list[int] = []
    best = math.inf
    for index in sorted(range(len(points)), key=lambda i: (*points[i], i)):
        if points[index][1] < best:
            found.append(index)
            best = points[index][1]
    return found
