"""Figures of a server in the text format of Prometheus."""

from __future__ import annotations

import bisect
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)

Labels = tuple[tuple[str, str], ...]


class Histogram:
    """Counts of observations up to each bound. Threads may share it."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self._lock = threading.Lock()
        self._counts = [0] * (len(self.bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        with self._lock:
            self._counts[bisect.bisect_left(self.bounds, value)] += 1
            self._sum += value

    def lines(self, name: str, labels: Labels) -> list[str]:
        """Return its lines."""
        with self._lock:
            counts, total = list(self._counts), self._sum
        found, reached = [], 0
        for bound, count in zip((*(f"{bound:g}" for bound in self.bounds), "+Inf"), counts, strict=True):
            reached += count
            found.append(f"{name}_bucket{written((*labels, ('le', bound)))} {reached}")
        return [*found, f"{name}_sum{written(labels)} {total:.6f}", f"{name}_count{written(labels)} {reached}"]


class Metrics:
    """What the HTTP side counts, by model."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._started = time.time()
        self._requests: dict[Labels, int] = defaultdict(int)
        self._finished: dict[Labels, int] = defaultdict(int)
        self._first: dict[str, Histogram] = {}
        self._between: dict[str, Histogram] = {}
        self._whole: dict[str, Histogram] = {}

    def request(self, path: str, status: int) -> None:
        """Count an answered request."""
        with self._lock:
            self._requests[("path", path), ("status", str(status))] += 1

    def finished(self, model: str, reason: str) -> None:
        """Count an ended sequence, by the reason why it ended."""
        with self._lock:
            self._finished[("model", model), ("reason", reason)] += 1

    def first_token(self, model: str) -> Histogram:
        """Return the histogram of the times to the first token, in seconds."""
        return self._of(self._first, model, SECONDS)

    def between_tokens(self, model: str) -> Histogram:
        """Return the histogram of the times between tokens, in seconds."""
        return self._of(self._between, model, TOKEN_SECONDS)

    def whole(self, model: str) -> Histogram:
        """Return the histogram of the times of sequences, in seconds."""
        return self._of(self._whole, model, SECONDS)

    def _of(self, histograms: dict[str, Histogram], model: str, bounds: Sequence[float]) -> Histogram:
        with self._lock:
            return histograms.setdefault(model, Histogram(bounds))

    def text(self, engines: Mapping[str, Mapping[str, float]], gauges: Mapping[str, float]) -> str:
        """Return all figures.

        Args:
            engines: the counters of each loaded model's engine.
            gauges: figures of the whole server, by name.
        """
        lines: list[str] = []

        def add(name: str, kind: str, help_text: str, values: Iterable[tuple[Labels, float]]) -> None:
            rows = [f"edgelm_{name}{written(labels)} {value:.15g}" for labels, value in values]
            lines.extend([f"# HELP edgelm_{name} {help_text}", f"# TYPE edgelm_{name} {kind}", *rows] if rows else [])

        with self._lock:
            requests, finished = dict(self._requests), dict(self._finished)
            histograms = [dict(found) for found in (self._first, self._between, self._whole)]
        add("start_time_seconds", "gauge", "Time when the server started, since 1970.", [((), self._started)])
        add("http_requests_total", "counter", "Answered requests by path and status.", sorted(requests.items()))
        for name, value in gauges.items():
            add(name, "gauge", GAUGES[name], [((), value)])
        for name, (kind, text) in ENGINE.items():
            add(name, kind, text, [((("model", model),), values[name]) for model, values in engines.items()])
        add("sequences_finished_total", "counter", "Ended sequences by reason.", sorted(finished.items()))
        for (name, text), found in zip(HISTOGRAMS.items(), histograms, strict=True):
            lines += [f"# HELP edgelm_{name} {text}", f"# TYPE edgelm_{name} histogram"] if found else []
            for model, histogram in sorted(found.items()):
                lines += histogram.lines(f"edgelm_{name}", (("model", model),))
        return "\n".join(lines) + "\n"


HISTOGRAMS = {
    "time_to_first_token_seconds": "From the request to its first token, with the wait in the queue.",
    "time_between_tokens_seconds": "Between two tokens of a sequence.",
    "sequence_seconds": "From the request to the end of a sequence.",
}
GAUGES = {
    "requests_active": "Requests that are being answered.",
    "models_loaded": "Models that are loaded.",
}
ENGINE = {
    "sequences_waiting": ("gauge", "Sequences that wait for a slot."),
    "sequences_running": ("gauge", "Sequences that have a slot."),
    "slots": ("gauge", "Sequences that can decode together."),
    "prompt_tokens_total": ("counter", "Tokens of prompts, reused ones included."),
    "reused_tokens_total": ("counter", "Tokens of prompts that were not computed again."),
    "generated_tokens_total": ("counter", "Generated tokens."),
    "steps_total": ("counter", "Steps of the engine: passes over the weights."),
    "busy_seconds_total": ("counter", "Time in these steps."),
    "prefix_cache_bytes": ("gauge", "Memory of computed prompts that are kept."),
}


def written(labels: Labels) -> str:
    """Return labels as Prometheus writes them."""
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels) + "}"


def _escaped(value: Any) -> str:
    return str(value).replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
