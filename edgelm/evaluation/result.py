"""Results of an evaluation, as dataclasses."""

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
    """KL(float || target) in nats per token: mean with its standard error over windows, median, 99th percentile.

    `top1`: fraction of tokens for which both models have the same most likely next token.
    """

    mean: float
    standard_error: float
    median: float
    p99: float
    top1: float


@dataclass(frozen=True)
class Speed:
    """Speed in tokens per second and peak memory in bytes of a short run in a separate process.

    Memory and load average are None where the system does not report them.
    """

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    peak_memory: int | None
    prompt_tokens: int
    new_tokens: int
    threads: int
    load_average: float | None


@dataclass(frozen=True)
class LayerError:
    """Error of the residual stream after a layer (-1: the embedding).

    Attributes:
        layer: the layer.
        error: |target - float| / |float|, median over tokens, estimated from sketches of 64 numbers.
        same_experts: fraction of tokens for which the router selected the same experts; None for the embedding and for
            dense models.
    """

    layer: int
    error: float
    same_experts: float | None


@dataclass(frozen=True)
class ExpertError:
    """Relative squared error of an expert's output on the float model's inputs, and the number of these tokens."""

    layer: int
    expert: int
    error: float
    tokens: int


@dataclass(frozen=True)
class ExpertErrors:
    """Relative squared errors |y - y_float|^2 / |y_float|^2 of all experts, summed over the tokens routed to each.

    Attributes:
        error: [L][E]; None where an expert got no token.
        worst: the experts with the largest errors, in descending order.
    """

    error: tuple[tuple[float | None, ...], ...]
    worst: tuple[ExpertError, ...]


@dataclass(frozen=True)
class TargetResult:
    """Result of one target with one type of KV cache.

    Attributes:
        name: name in tables: the target, and the type of the cache where several were measured.
        target: the target as given.
        kind: "bundle", "checkpoint" or "recipe".
        recipe: the recipe's name.
        arithmetic: runtime, operators and cache that computed the result.
        kv: type of the KV cache; None except for bundles.
        stored_bytes: bytes of the weights.
        bits_per_weight: None where the number of weights is not known (bundles without a float checkpoint).
        loss: mean -log p(next token) in nats.
        perplexity: exp of the mean loss.
        kl: KL from the float model; None without one.
        kv_loss: KL minus the KL with a float32 cache, over the same windows; None where that was not measured.
        speed: None except for bundles.
        layers: error of each layer; None unless requested.
        experts: error of each expert; None unless requested, and for bundles and dense models.
        files: size and SHA-256 of the files that were measured.
        notes: remarks on the numbers.
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
    """The evaluation text: tokens = windows x length. For each token, the prediction of the next one is scored."""

    name: str
    sha256: str
    windows: int
    length: int
    tokens: int


@dataclass(frozen=True)
class ReferenceResult:
    """The float model. `expert_tokens` [L][E]: number of tokens routed to each expert; None unless measured."""

    checkpoint: str
    stored_bytes: int
    weights: int
    loss: Estimate
    perplexity: float
    expert_tokens: tuple[tuple[int, ...], ...] | None
    files: dict[str, dict[str, Any]]

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight of the stored float model."""
        return 8 * self.stored_bytes / self.weights


@dataclass(frozen=True)
class EvaluationReport:
    """Result of `edgelm.evaluation.evaluate`."""

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
        """Return the report as JSON-ready values. Numbers that are not finite become null, since JSON has none."""
        document: dict[str, Any] = {"format": FORMAT, "format_version": FORMAT_VERSION, **json_ready(asdict(self))}
        return document

    def to_json(self) -> str:
        """Return the report as a JSON document."""
        return json.dumps(self.to_dict(), allow_nan=False)


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the Pareto frontier: the points (size, loss) for which no other is better in both.

    They are sorted by ascending size; of equal points the first is kept.
    """
    found: list[int] = []
    best = math.inf
    for index in sorted(range(len(points)), key=lambda i: (*points[i], i)):
        if points[index][1] < best:
            found.append(index)
            best = points[index][1]
    return found
