"""Reports of one device and bundle, as one column of a comparison."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgelm.comparison.documents import (
    BenchDocument,
    CheckDocument,
    DeviceDocument,
    EnergyDocument,
    ParityDocument,
    ReportDocument,
    SpreadDocument,
    read_report,
)
from edgelm.errors import ReportError

WEIGHTS = ".data"
"""End of the names of the files that hold a bundle's weights."""
_OTHER_KINDS = {
    "integrity": "the bundle's files are damaged",
    "tokenizer": "another tokenizer",
    "float_kl": "quantisation lost more than --max-kl",
    "pack": "the parity pack is another",
}


@dataclass(frozen=True)
class Parity:
    """What a parity check found.

    Attributes:
        passed: whether every check passed.
        finding: the result in a few words: "passed", or the first difference.
        kl, kl_limit: mean KL to the quantised reference in nats, and its limit.
        kl_float, kl_recipe: mean KL to the float model in nats: of the device, and of the recipe alone.
        top1: share of positions with the quantised reference's most probable token.
        layers: (layer, relative error after it).
    """

    passed: bool
    finding: str
    kl: float | None
    kl_limit: float | None
    kl_float: float | None
    kl_recipe: float | None
    top1: float | None
    layers: tuple[tuple[int, float | None], ...]
    damaged: bool = False


@dataclass(frozen=True)
class Speed:
    """Speed: seconds, tokens per second, joules per token. `how` says what measured it."""

    load: float | None
    prefill: float | None
    decode: float | None
    how: str
    prefill_joules: float | None = None
    decode_joules: float | None = None


@dataclass(frozen=True)
class Entry:
    """One column: a device that runs a bundle. `hashes` are the SHA-256 of the bundle's files, by name."""

    name: str
    files: tuple[str, ...]
    device: DeviceDocument
    bundle: str
    model: str
    recipe: str
    source: str | None
    exported_with: str | None
    hashes: Mapping[str, str]
    sizes: Mapping[str, int]
    ops: str | None
    kv: str | None
    runtime: str
    engine: str | None
    isa: str | None
    threads: int
    made_by: str | None
    created: str | None
    parity: Parity | None
    speed: Speed | None
    memory: int | None
    notes: tuple[str, ...] = ()

    @property
    def weights(self) -> str | None:
        """Hash of the weights; None where the report has none."""
        return _digest({name: value for name, value in self.hashes.items() if name.endswith(WEIGHTS)})

    @property
    def export(self) -> str | None:
        """Hash of all files of the bundle; None where the report has none."""
        return _digest(self.hashes)


def _digest(hashes: Mapping[str, str]) -> str | None:
    if not hashes:
        return None
    lines = "".join(f"{name} {value}\n" for name, value in sorted(hashes.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def read_entries(paths: Sequence[Path], names: Sequence[str] = ()) -> tuple[list[Entry], list[str]]:
    """Read reports. A benchmark of the same device, bundle and settings joins the parity report before or after it.

    Args:
        paths: the files, in the order of the columns.
        names: names of the first files; the others are named by their file.

    Returns:
        The columns, and notes.

    Raises:
        ReportError: a file is no report, or is given twice.
    """
    notes: list[str] = []
    found: list[Entry] = []
    check_twice(paths)
    for path, name in zip(paths, unique_names(paths, names), strict=True):
        documents, more = read_report(path)
        notes += more
        found += entries_of(documents, name, path)
    for index, entry in enumerate(found):
        alike = replace(entry, name="", files=())
        twin = next((other for other in found[:index] if replace(other, name="", files=()) == alike), None)
        if twin is not None:
            notes.append(f"{twin.name} and {entry.name} are the same report")
    return _joined(found, notes), notes


def entries_of(documents: Sequence[ParityDocument | BenchDocument], name: str, path: Path) -> list[Entry]:
    """Return the columns of the documents of one file."""
    several = len(documents) > 1
    return [
        _of_parity(document, name, path)
        if isinstance(document, ParityDocument)
        else _of_bench(document, _named(document, name) if several else name, path)
        for document in documents
    ]


def check_twice(paths: Sequence[Path]) -> None:
    """Check that no file is given twice, also under two paths.

    Raises:
        ReportError: one is.
    """
    for index, path in enumerate(paths):
        for earlier in paths[:index]:
            if earlier == path or (earlier.exists() and path.exists() and earlier.samefile(path)):
                raise ReportError(f"{path} is given twice: give each report once")


def unique_names(paths: Sequence[Path], names: Sequence[str] = ()) -> list[str]:
    """Return the names of the columns: those given, then the files' without their end; with the folder where needed.

    Raises:
        ReportError: there are more names than files, or a name is empty or given twice.
    """
    if len(names) > len(paths):
        raise ReportError(f"there are {len(names)} names for {len(paths)} reports: give one --name for each at most")
    for name in names:
        if not name.strip() or list(names).count(name) > 1:
            raise ReportError(f"the name {name!r} is empty or given twice: give each report its own")
    stems = [path.stem for path in paths[len(names) :]]
    made = list(names)
    for path, stem in zip(paths[len(names) :], stems, strict=True):
        name = stem if stems.count(stem) == 1 and stem not in names else f"{path.absolute().parent.name}/{stem}"
        base, number = name, 2
        while name in made:
            name, number = f"{base} ({number})", number + 1
        made.append(name)
    return made


def _named(document: BenchDocument, name: str) -> str:
    tokens = f"{document.prompt_tokens} tokens{_batch(document)}"
    return f"{name}: {Path(document.bundle).name}, {document.threads} threads, {tokens}"


def _batch(document: BenchDocument) -> str:
    return f", batch {document.batch}" if document.batch > 1 else ""


def _entry(
    document: ReportDocument,
    name: str,
    path: Path,
    *,
    model: str,
    hashes: Mapping[str, str],
    sizes: Mapping[str, int],
    speed: Speed | None,
    parity: Parity | None = None,
    source: str | None = None,
    exported_with: str | None = None,
) -> Entry:
    """Return the column of a document: what both kinds have, and what only one of them has or has otherwise."""
    return Entry(
        name=name,
        files=(str(path),),
        device=document.device,
        bundle=document.bundle,
        model=model,
        recipe=document.recipe,
        source=source,
        exported_with=exported_with,
        hashes=hashes,
        sizes=sizes,
        ops=document.ops,
        kv=document.kv,
        runtime=document.runtime,
        engine=document.engine,
        isa=document.isa,
        threads=document.threads,
        made_by=document.made_by,
        created=document.created,
        parity=parity,
        speed=speed,
        memory=document.resident_peak,
        notes=document.notes,
    )


def _of_parity(document: ParityDocument, name: str, path: Path) -> Entry:
    limit = next((check.limit for check in document.checks if check.name == "logits.kl_mean"), None)
    loss = document.float_loss
    speed = document.speed
    return _entry(
        document,
        name,
        path,
        model=document.model.name,
        source=document.source,
        exported_with=document.tools.get("edgelm"),
        hashes={file: info.sha256 for file, info in document.files.items() if info.sha256 is not None},
        sizes={file: info.size for file, info in document.files.items() if info.size is not None},
        parity=Parity(
            passed=document.passed,
            finding=_finding(document),
            kl=document.kl_mean,
            kl_limit=limit,
            kl_float=loss.kl if loss.known else None,
            kl_recipe=loss.kl_reference if loss.known else None,
            top1=document.top1,
            layers=tuple((layer.layer, layer.error) for layer in document.diagnosis.layers)
            if document.diagnosis
            else (),
            damaged=any(check.name == "integrity" for check in _failed(document)),
        ),
        speed=None
        if speed is None
        else Speed(speed.load_s, speed.prefill_tokens_per_s, speed.decode_tokens_per_s, "short runs of the check"),
    )


def _failed(document: ParityDocument) -> list[CheckDocument]:
    return [check for check in document.checks if check.passed is False]


def _finding(document: ParityDocument) -> str:
    """Return the result in a few words, as `ParityReport.sentence` has it."""
    if document.passed:
        return "passed"
    failed = _failed(document)
    place = (document.cause or "").partition(": ")[0]
    if place:
        return place
    kinds = {check.name.split(".")[0] for check in failed}
    if kinds and kinds <= _OTHER_KINDS.keys():
        return ", ".join(text for kind, text in _OTHER_KINDS.items() if kind in kinds)
    return "1 check failed" if len(failed) == 1 else f"{len(failed)} checks failed"


def _of_bench(document: BenchDocument, name: str, path: Path) -> Entry:
    energy = document.energy or EnergyDocument()
    return _entry(
        document,
        name,
        path,
        model=document.model,
        hashes=document.sha256 or {},
        sizes=document.files,
        speed=Speed(
            document.load_seconds,
            document.prefill_tokens_per_second.median,
            document.decode_tokens_per_second.median,
            f"bench, {document.prompt_tokens} + {document.new_tokens} tokens{_batch(document)}",
            _median(energy.prefill_joules_per_token),
            _median(energy.decode_joules_per_token),
        ),
    )


def _median(spread: SpreadDocument | None) -> float | None:
    return None if spread is None else spread.median


def _joined(entries: Sequence[Entry], notes: list[str]) -> list[Entry]:
    """Put each benchmark into the column of the parity report that it belongs to, if there is one without."""
    result: list[Entry] = [entry for entry in entries if entry.parity is not None]
    has_bench: set[int] = set()
    places = {id(entry): index for index, entry in enumerate(result)}
    alone: list[Entry] = []
    for bench in (entry for entry in entries if entry.parity is None):
        index = next((i for i, entry in enumerate(result) if i not in has_bench and _same_run(entry, bench)), None)
        if index is None:
            alone.append(bench)
            continue
        has_bench.add(index)
        entry = result[index]
        notes.append(f"speed and memory of {entry.name} are from {Path(bench.files[0]).name}")
        result[index] = replace(
            entry, files=(*entry.files, *bench.files), speed=bench.speed, memory=bench.memory or entry.memory,
            isa=entry.isa or bench.isa, engine=entry.engine or bench.engine, ops=entry.ops or bench.ops,
            kv=entry.kv or bench.kv, notes=(*entry.notes, *bench.notes),
        )  # fmt: skip
    # In the order given.
    return [result[places[id(entry)]] if id(entry) in places else entry for entry in entries
            if id(entry) in places or any(entry is one for one in alone)]  # fmt: skip


def _same_run(parity: Entry, bench: Entry) -> bool:
    """Return whether both reports are of the same device, bundle and settings. Old ones lack hashes and types."""

    def machine(entry: Entry) -> tuple[object, ...]:
        device = entry.device
        return device.cpu, device.architecture, device.logical_cores, device.memory_total

    def agree(one: object, other: object) -> bool:
        return one is None or other is None or one == other

    same_bundle = agree(parity.export, bench.export) and parity.sizes == bench.sizes
    same_settings = (parity.runtime, parity.threads) == (bench.runtime, bench.threads) and agree(parity.kv, bench.kv)
    return machine(parity) == machine(bench) and same_bundle and same_settings and agree(parity.isa, bench.isa)
