"""Compare reports: which settings are the same, which differ, what was measured, and the answer in a few sentences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgelm.comparison.entries import Entry, read_entries
from edgelm.errors import ReportError
from edgelm.sizes import format_number, format_size

SHORT_HASH = 12
"""Hexadecimal digits of a hash that tables show."""


def _kl(value: float) -> str:
    return f"{value:.3g}"


def _percent(value: float) -> str:
    return "100 %" if value == 1 else f"{100 * min(value, 0.9999):.2f} %"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 0.1 else f"{value:.3f} s"


def _times(ratio: float) -> str:
    return f"{ratio:.2f}x" if 0.1 <= ratio < 100 else f"{ratio:.3g}x"


@dataclass(frozen=True)
class Measure:
    """A measured number of an entry.

    Attributes:
        key: its name in JSON.
        title: its name for people, with the unit.
        short: its name in the terminal's table.
        better: "lower" or "higher".
        get: returns it, None where the report has none.
        text: formats it.
    """

    key: str
    title: str
    short: str
    better: str
    get: Callable[[Entry], float | None]
    text: Callable[[float], str]

    @property
    def heading(self) -> str:
        """The title with the direction that is better."""
        return f"{self.title} {'↓' if self.better == 'lower' else '↑'}"


def _of(part: str, name: str) -> Callable[[Entry], float | None]:
    def get(entry: Entry) -> float | None:
        found = getattr(entry, part)
        return None if found is None else getattr(found, name)

    return get


MEASURES = (
    Measure("kl", "Mean KL to the quantised reference, nats", "KL", "lower", _of("parity", "kl"), _kl),
    Measure("kl_float", "Mean KL to the float model, nats", "KL to float", "lower", _of("parity", "kl_float"), _kl),
    Measure("top1", "Most probable token as the reference", "top-1", "higher", _of("parity", "top1"), _percent),
    Measure("prefill_tokens_per_second", "Prefill, tokens/s", "prefill/s", "higher", _of("speed", "prefill"),
            format_number),
    Measure("decode_tokens_per_second", "Decode, tokens/s", "decode/s", "higher", _of("speed", "decode"),
            format_number),
    Measure("load_seconds", "Load", "load", "lower", _of("speed", "load"), _seconds),
    Measure("resident_peak", "Peak memory", "memory", "lower", lambda entry: entry.memory, format_size),
    Measure("prefill_joules_per_token", "Energy of prefill, J/token", "prefill J", "lower",
            _of("speed", "prefill_joules"), _kl),
    Measure("decode_joules_per_token", "Energy of decode, J/token", "decode J", "lower", _of("speed", "decode_joules"),
            _kl),
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """Something that is the same in the reports or not: `get` returns it as text, None where the report lacks it."""

    group: str
    title: str
    get: Callable[[Entry], str | None]


def _hash(value: str | None) -> str | None:
    return None if value is None else value[:SHORT_HASH]


def _cores(entry: Entry) -> str | None:
    device = entry.device
    if device.logical_cores is None:
        return None
    physical = "" if device.physical_cores is None else f" ({device.physical_cores} physical)"
    return f"{device.logical_cores}{physical}"


def _memory(entry: Entry) -> str | None:
    total = entry.device.memory_total
    return None if total is None else format_size(total)


SETTINGS = (
    Setting("Bundle", "Weights, SHA-256", lambda entry: _hash(entry.weights)),
    Setting("Bundle", "All files, SHA-256", lambda entry: _hash(entry.export)),
    Setting("Bundle", "Model", lambda entry: entry.model),
    Setting("Bundle", "Recipe", lambda entry: entry.recipe),
    Setting("Bundle", "Exported from", lambda entry: entry.source),
    Setting("Bundle", "Exported with EdgeLM", lambda entry: entry.exported_with),
    Setting("Bundle", "Operators", lambda entry: entry.ops),
    Setting("Run", "Report made by", lambda entry: entry.made_by),
    Setting("Run", "Runtime", lambda entry: entry.runtime),
    Setting("Run", "Engine", lambda entry: entry.engine),
    Setting("Run", "Kernels", lambda entry: entry.isa),
    Setting("Run", "KV cache", lambda entry: entry.kv),
    Setting("Run", "Threads", lambda entry: str(entry.threads)),
    Setting("Run", "Speed from", lambda entry: None if entry.speed is None else entry.speed.how),
    Setting("Device", "CPU", lambda entry: entry.device.cpu),
    Setting("Device", "Architecture", lambda entry: entry.device.architecture or None),
    Setting("Device", "System", lambda entry: entry.device.system or None),
    Setting("Device", "Cores", _cores),
    Setting("Device", "Memory", _memory),
    Setting("Device", "Instruction sets", lambda entry: ", ".join(entry.device.instruction_sets) or None),
)


@dataclass(frozen=True)
class SettingRow:
    """A setting over all entries. `same` is None where fewer than two reports have it."""

    setting: Setting
    values: tuple[str | None, ...]

    @property
    def same(self) -> bool | None:
        """Whether all reports that have the setting agree."""
        known = [value for value in self.values if value is not None]
        return len(set(known)) == 1 if len(known) > 1 else None

    @property
    def word(self) -> str:
        """The same in a word; empty where there is nothing to compare."""
        return {True: "same", False: "differs", None: ""}[self.same]

    def groups(self, names: Sequence[str]) -> dict[str, list[str]]:
        """Return the names of the reports with each value."""
        found: dict[str, list[str]] = {}
        for name, value in zip(names, self.values, strict=True):
            found.setdefault("not in the report" if value is None else value, []).append(name)
        return found


@dataclass(frozen=True)
class Comparison:
    """Reports side by side. `base` is the index of the report that ratios refer to; None for no ratios."""

    entries: tuple[Entry, ...]
    notes: tuple[str, ...] = ()
    base: int | None = None
    settings: tuple[SettingRow, ...] = field(init=False)

    def __post_init__(self) -> None:
        rows = tuple(SettingRow(item, tuple(item.get(entry) for entry in self.entries)) for item in SETTINGS)
        object.__setattr__(self, "settings", tuple(row for row in rows if any(value for value in row.values)))

    @property
    def names(self) -> list[str]:
        """The names of the columns."""
        return [entry.name for entry in self.entries]

    @property
    def passed(self) -> bool | None:
        """Whether every parity report passed; None without one."""
        found = [entry.parity.passed for entry in self.entries if entry.parity is not None]
        return all(found) if found else None

    @property
    def measures(self) -> list[Measure]:
        """The measures that a report has."""
        return [measure for measure in MEASURES if any(measure.get(entry) is not None for entry in self.entries)]

    def ratio(self, measure: Measure, entry: Entry) -> float | None:
        """Return an entry's number as a multiple of the base's; None without a base, and for the base."""
        if self.base is None or entry is self.entries[self.base] or measure.key == "top1":
            return None
        mine, base = measure.get(entry), measure.get(self.entries[self.base])
        return None if mine is None or not base else mine / base

    def cell(self, measure: Measure, entry: Entry) -> str:
        """Return an entry's number for people, with its ratio."""
        value, ratio = measure.get(entry), self.ratio(measure, entry)
        if value is None:
            return "-"
        return measure.text(value) + ("" if ratio is None else f" ({_times(ratio)})")

    @property
    def sentences(self) -> list[str]:
        """The answer: which devices passed, and whether the weights are the same."""
        return [*_result(self.entries), _weights(self.entries)]

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON document."""
        names = self.names
        shared = next((row for row in self.settings if row.setting.title.startswith("Weights")), None)
        return {
            "format": "edgelm-compare",
            "format_version": 1,
            "passed": self.passed,
            "same_weights": None if shared is None or None in shared.values else shared.same,
            "base": None if self.base is None else names[self.base],
            "reports": [self._entry(entry) for entry in self.entries],
            "same": {row.setting.title: next(v for v in row.values if v) for row in self.settings if row.same},
            "differs": {
                row.setting.title: dict(zip(names, row.values, strict=True))
                for row in self.settings
                if row.same is False
            },
            "notes": list(self.notes),
        }

    def _entry(self, entry: Entry) -> dict[str, Any]:
        parity = entry.parity
        found: dict[str, Any] = {
            "name": entry.name,
            "files": list(entry.files),
            "passed": parity and parity.passed,
            "finding": parity and parity.finding,
            "kl_limit": parity and parity.kl_limit,
            **{measure.key: measure.get(entry) for measure in MEASURES},
            "speed_from": entry.speed and entry.speed.how,
            "weights_sha256": entry.weights,
            "bundle": entry.bundle,
            "created": entry.created,
            **{
                row.setting.title.lower(): row.setting.get(entry)
                for row in self.settings
                if "SHA" not in row.setting.title
            },
        }
        if self.base is not None:
            ratios = {measure.key: self.ratio(measure, entry) for measure in self.measures}
            found["ratios"] = {key: value for key, value in ratios.items() if value is not None}
        return found


def _joined_names(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _result(entries: Sequence[Entry]) -> list[str]:
    checked = [(entry, entry.parity) for entry in entries if entry.parity is not None]
    if not checked:
        return []
    failed = [(entry, parity) for entry, parity in checked if not parity.passed]
    if not failed:
        count = "1 parity report" if len(checked) == 1 else f"All {len(checked)} parity reports"
        return [f"{count} passed: the same model as the reference on each device."]
    said = "; ".join(f"{entry.name} ({parity.finding})" for entry, parity in failed)
    return [f"{len(failed)} of {len(checked)} parity reports FAILED: {said}."]


def _weights(entries: Sequence[Entry]) -> str:
    """Say plainly whether the reports are of the same weights."""
    found: dict[str, list[str]] = {}
    unknown = []
    for entry in entries:
        if entry.weights is None:
            unknown.append(entry.name)
        else:
            found.setdefault(entry.weights, []).append(entry.name)
    damaged = [entry.name for entry in entries if entry.parity is not None and entry.parity.damaged]
    if not found:
        text = "Whether the weights are the same is not known: no report has their hash."
    elif len(found) == 1:
        value, names = next(iter(found.items()))
        whose = "the same in all reports" if not unknown else f"the same in {_joined_names(names)}"
        whose = "those of the one report" if len(entries) == 1 else whose
        text = f"The weights are {whose} (SHA-256 {value[:SHORT_HASH]})."
    else:
        said = "; ".join(f"{_joined_names(names)}: {value[:SHORT_HASH]}" for value, names in found.items())
        text = f"The weights are NOT the same ({said}): the reports compare different bundles, not only devices."
    if found and unknown:
        text += f" Not known for {_joined_names(unknown)}: the report has no hash."
    if damaged:
        text += f" On {_joined_names(damaged)} the files are not those that the hash is of."
    return text


def compare(paths: Sequence[Path], names: Sequence[str] = (), base: str | None = None) -> Comparison:
    """Read reports and compare them.

    Args:
        paths: files of `edgelm parity --json` or `edgelm bench --json`.
        names: names of the first files; the others are named by their file.
        base: the report that ratios refer to: its file or its name. A file that is not among `paths` is read too, as
            the first one.

    Raises:
        ReportError: a file is no report, is given twice, or there is no such base.
    """
    index = None
    if base is not None and not any(base in (name, str(path)) for name, path in _pairs(paths, names)):
        known = next((path for path in paths if path.exists() and Path(base).exists() and path.samefile(base)), None)
        if known is not None:
            base = str(known)
        elif base and Path(base).exists():
            paths, names = [Path(base), *paths], [Path(base).stem, *names] if names else names
        else:
            raise ReportError(f"there is no report {base!r} to compare with: give the file or the name of a report")
    entries, notes = read_entries(paths, names)
    if base is not None:
        index = next((i for i, entry in enumerate(entries) if base == entry.name or base in entry.files), None)
        if index is None:
            index = next((i for i, entry in enumerate(entries) if entry.name.startswith(f"{base}:")), 0)
    return Comparison(tuple(entries), tuple(notes), index)


def _pairs(paths: Sequence[Path], names: Sequence[str]) -> list[tuple[str, Path]]:
    from edgelm.comparison.entries import unique_names

    return list(zip(unique_names(paths, names), paths, strict=True))
