"""Benchmark of several bundles and settings, in turns: what slows the machine down for a while meets all of them.

All models stay loaded where memory allows; otherwise each repetition loads them one after the other.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edgelm import devices
from edgelm.benchmark import (
    FORMAT,
    FORMAT_VERSION,
    BenchResult,
    Resident,
    Run,
    Session,
    Settings,
    counted_tokens,
    memory_bandwidth,
)
from edgelm.bundle import Bundle
from edgelm.bundle.reads import cache_bytes
from edgelm.errors import EdgeLMError
from edgelm.measuring.energy import Meter
from edgelm.progress import Progress, Silent
from edgelm.sizes import format_size

_FREE_SHARE = 0.8
"""Share of the free memory that loaded models may take."""
_FIXED_BYTES = 100 << 20
"""Memory of a loaded model besides its weights and its KV cache, about."""


@dataclass(frozen=True)
class Skipped:
    """A combination that was not measured, and why. None stands for the default."""

    bundle: str
    runtime: str | None
    threads: int | None
    kv: str | None
    batch: int
    prompt_tokens: int | None
    reason: str

    @property
    def text(self) -> str:
        """The combination in words, with the reason."""
        parts = [
            self.runtime or "",
            "" if self.threads is None else f"threads {self.threads}",
            self.kv or "",
            f"batch {self.batch}" if self.batch > 1 else "",
            self._prompt,
        ]
        return f"{', '.join([self.bundle, *filter(None, parts)])}: not measured: {self.reason}"

    @property
    def _prompt(self) -> str:
        return "" if self.prompt_tokens is None else f"{self.prompt_tokens:,} prompt tokens"


@dataclass(frozen=True)
class Matrix:
    """Results of several combinations.

    Attributes:
        results: in the order of the bundles and options.
        skipped: what was not measured.
        together: whether all models stayed loaded.
        interrupted: whether Ctrl-C ended the measurement before all repetitions were done.
        notes: how it was measured, one sentence each.
    """

    results: tuple[BenchResult, ...]
    skipped: tuple[Skipped, ...]
    together: bool
    interrupted: bool
    notes: tuple[str, ...]

    @property
    def skipped_lines(self) -> list[str]:
        """What was not measured, a line for all combinations of a bundle that have one reason."""
        found: dict[tuple[str, int | None, str], list[Skipped]] = {}
        for item in self.skipped:
            found.setdefault((item.bundle, item.prompt_tokens, item.reason), []).append(item)
        return [
            items[0].text if len(items) == 1 else replace(items[0], runtime=None, threads=None, kv=None, batch=1).text
            for items in found.values()
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON document with the document of each result."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "results": [result.as_dict() for result in self.results],
            "skipped": [vars(item) for item in self.skipped],
            "together": self.together,
            "interrupted": self.interrupted,
            "notes": list(self.notes),
        }


@dataclass
class _Group:
    """A model as it is loaded, with the lengths that it is measured with, and what was measured."""

    settings: Settings
    lengths: list[tuple[tuple[int, int], tuple[str, ...]]]
    session: Session | None = None
    loads: list[float] = field(default_factory=list)
    runs: dict[tuple[int, int], list[Run]] = field(default_factory=dict)
    summaries: dict[tuple[int, int], BenchResult] = field(default_factory=dict)
    loaded_bytes: int | None = 0
    used_bytes: int | None = 0

    @property
    def context(self) -> int:
        return max(prompt + new for (prompt, new), _ in self.lengths)

    @property
    def needed(self) -> int:
        """Bytes of memory that it needs, about: weights and KV cache."""
        manifest = self.settings.bundle.manifest
        kind = self.settings.kv or manifest.graph.kv_dtype
        row = cache_bytes(manifest.model, kind, manifest.ops, self.context)
        return round(sum(info.size for info in manifest.files.values()) + self.settings.batch * row) + _FIXED_BYTES

    def skipped(self, reason: str, prompt: int | None = None) -> Skipped:
        own = self.settings
        return Skipped(str(own.bundle.path), own.runtime, own.threads, own.kv, own.batch, prompt, reason)


class _Measurement:
    def __init__(self, groups: Sequence[_Group], skipped: list[Skipped], repeat: int, together: bool) -> None:
        self.groups, self.skipped, self.repeat, self.together = list(groups), skipped, repeat, together
        self.meter = Meter()
        self.bandwidths: dict[int, float | None] = {}

    def measure(self, progress: Progress) -> bool:
        """Measure all groups; return whether Ctrl-C ended it.

        Raises:
            KeyboardInterrupt: nothing was measured yet.
        """
        runs = sum(len(group.lengths) for group in self.groups)
        # One round is not counted; when models are loaded in turn, there is one uncounted run after each loading.
        total = runs * (self.repeat + 1) if self.together else (runs + len(self.groups)) * self.repeat
        try:
            with progress.task("measuring", total, unit="steps") as advance:
                self._warm_up()
                if self.together:
                    for group in list(self.groups):
                        self._open(group)
                for number in range(-1 if self.together else 0, self.repeat):
                    # The order is turned around each time.
                    for group in list(self.groups)[:: 1 if number % 2 else -1]:
                        self._round(group, number, advance)
                    self._measure_bandwidth()
        except KeyboardInterrupt:
            if not any(group.summaries for group in self.groups):
                raise
            return True
        finally:
            for group in self.groups:
                self._close(group)
        return False

    def _measure_bandwidth(self) -> None:
        """Measure the memory's bandwidth, where decoding is bound by it; the best of all repetitions counts."""
        results = [result for group in self.groups for result in group.summaries.values()]
        on_cpu = [one for one in results if one.decode_bandwidth is not None and one.machine_bandwidth is None]
        for threads in {result.threads for result in on_cpu}:
            found, known = memory_bandwidth(threads), self.bandwidths.get(threads)
            self.bandwidths[threads] = found if known is None or found is None else max(found, known)

    def results(self) -> Iterator[BenchResult]:
        """Yield what was measured, in the order of the groups and lengths."""
        for group in self.groups:
            for lengths, _ in group.lengths:
                result = group.summaries.get(lengths)
                if result is not None and result.machine_bandwidth is None and result.decode_bandwidth is not None:
                    result = replace(result, machine_bandwidth=self.bandwidths.get(result.threads))
                if result is not None:
                    yield result

    def _warm_up(self) -> None:
        """Load the smallest model once, so that no load is charged with the import of the runtime's packages."""
        if self.groups:
            group = min(self.groups, key=lambda one: one.needed)
            with contextlib.suppress(EdgeLMError), Session(group.settings, group.context, self.meter):
                pass

    def _round(self, group: _Group, number: int, advance: Any) -> None:
        if not self.together:
            if not self._open(group):
                return
            self._run(group, *group.lengths[0][0])
            advance(1)
        for lengths, notes in group.lengths[:: 1 if number % 2 else -1]:
            run = self._run(group, *lengths)
            if number >= 0:
                group.runs.setdefault(lengths, []).append(run)
                # After each run, so that nothing is lost by Ctrl-C.
                self._summarise(group, lengths, notes)
            advance(1)
        if not self.together:
            self._close(group)

    def _summarise(self, group: _Group, lengths: tuple[int, int], notes: tuple[str, ...]) -> None:
        assert group.session is not None
        resident = Resident(None, group.loaded_bytes, group.used_bytes, None)
        group.summaries[lengths] = group.session.result(*lengths, group.runs[lengths], group.loads, resident, notes)

    def _open(self, group: _Group) -> bool:
        before, _ = devices.resident_memory()
        try:
            group.session = Session(group.settings, group.context, self.meter)
        except EdgeLMError as error:
            self.skipped.append(group.skipped(str(error)))
            self.groups.remove(group)
            return False
        group.loads.append(group.session.load_seconds)
        after, _ = devices.resident_memory()
        group.loaded_bytes = group.used_bytes = None if before is None or after is None else after - before
        return True

    def _run(self, group: _Group, prompt: int, new: int) -> Run:
        assert group.session is not None
        before, _ = devices.resident_memory()
        run = group.session.run(prompt, new)
        after, _ = devices.resident_memory()
        if group.used_bytes is not None and before is not None and after is not None:
            group.used_bytes += after - before
        return run

    def _close(self, group: _Group) -> None:
        if group.session is not None:
            group.session.close()
            group.session = None
            gc.collect()


def bench_matrix(
    bundles: Sequence[Path | str],
    *,
    runtimes: Sequence[str | None] = (None,),
    threads: Sequence[int | None] = (None,),
    kv: Sequence[str | None] = (None,),
    batch: Sequence[int] = (1,),
    prompt_tokens: Sequence[int | None] = (None,),
    new_tokens: int | None = None,
    repeat: int = 5,
    weight_memory: int | None = None,
    progress: Progress | None = None,
) -> Matrix:
    """Measure every combination of bundles, runtimes, threads, KV caches, batches and prompt lengths.

    A combination that cannot be measured is left out, with the reason: its tokens do not fit into the context, or no
    runtime here can load it. None in a list stands for the default.

    Args:
        bundles: the bundles.
        runtimes, threads, kv, weight_memory: as for `edgelm.load`, each a list.
        batch: numbers of sequences that decode together.
        prompt_tokens: lengths of the prompt.
        new_tokens: tokens to decode.
        repeat: measured runs of each.
        progress: where to report progress.

    Raises:
        BundleError: a bundle cannot be opened.
        EdgeLMError: a count is below 1, or nothing could be measured.
        KeyboardInterrupt: before anything was measured; later, the result has what was measured until then.
    """
    for value in (*batch, *prompt_tokens, new_tokens, repeat):
        if value is not None and value < 1:
            raise EdgeLMError(f"{value} is below 1: give counts of 1 or more")
    skipped: list[Skipped] = []
    opened = [Bundle.open(path) for path in bundles]
    settings = [
        Settings(bundle, runtime, count, kind, size, weight_memory)
        for bundle, runtime, count, kind, size in itertools.product(opened, runtimes, threads, kv, batch)
    ]
    groups = [group for one in settings if (group := _group(one, prompt_tokens, new_tokens, skipped)).lengths]
    together, note = _fit(groups)
    measurement = _Measurement(groups, skipped, repeat, together)
    interrupted = measurement.measure(progress or Silent())
    results = list(measurement.results())
    if not results:
        raise EdgeLMError(skipped[0].text if len(skipped) == 1 else f"nothing was measured; {skipped[0].text}")
    for group in measurement.groups if interrupted else ():
        missing = [lengths for lengths, _ in group.lengths if lengths not in group.summaries]
        skipped += [group.skipped("interrupted before it was measured", prompt) for prompt, _ in missing]
    notes = [note] if len(results) > 1 else []
    if interrupted:
        notes.append("interrupted: the figures are those of the runs until then")
    return Matrix(tuple(results), tuple(skipped), together, interrupted, tuple(notes))


def _group(settings: Settings, prompts: Sequence[int | None], new: int | None, skipped: list[Skipped]) -> _Group:
    group = _Group(settings, [])
    for prompt in prompts:
        try:
            lengths, notes = counted_tokens(settings.bundle.manifest, prompt, new)
        except EdgeLMError as error:
            skipped.append(group.skipped(str(error), prompt))
            continue
        if lengths not in [known for known, _ in group.lengths]:
            group.lengths.append((lengths, notes))
    return group


def _fit(groups: Sequence[_Group]) -> tuple[bool, str]:
    """Return whether all models fit into the free memory at once, and the sentence about it."""
    needed = sum(group.needed for group in groups)
    free = devices.describe().memory_available
    if free is None or needed <= _FREE_SHARE * free:
        return True, "all models stay loaded, and their runs take turns"
    return False, (
        f"together the models need about {format_size(needed)}, {format_size(free)} are free: each repetition loads "
        "them one after the other"
    )
