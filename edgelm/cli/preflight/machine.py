"""What EdgeLM can do on this machine, and what is missing."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
from typing import TYPE_CHECKING, Any

from edgelm.cli.common.options import EXPORT_PACKAGES
from edgelm.installing import install_hint

if TYPE_CHECKING:
    from edgelm.runtimes import RuntimeEntry

CORE = ("numpy", "click", "tokenizers", "sentencepiece", "jinja2", "rich")


def version_of(package: str) -> str | None:
    """Return the installed version of a package, None if it is not installed."""
    if importlib.util.find_spec(package) is None:
        return None
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        # Installed under another distribution's name, as onnxruntime by onnxruntime-gpu.
        return str(getattr(importlib.import_module(package), "__version__", "of unknown version"))


def examine() -> dict[str, Any]:
    """Return everything that doctor reports, as a JSON document."""
    import edgelm
    from edgelm import devices
    from edgelm.runtimes import runtimes

    gpu = gpus()
    problems = {entry.name: entry.problem() for entry in runtimes()}
    found = {
        entry.name: {
            "summary": entry.summary,
            "available": entry.available,
            "usable": entry.available
            and not entry.only_by_name
            and problems[entry.name] is None
            and (bool(gpu["devices"]) or not _needs_gpu(entry)),
            "problem": problems[entry.name],
            "needs_gpu": _needs_gpu(entry),
            # EdgeLM's own kernels need numpy alone, whose version says nothing about them.
            "version": None if entry.requires in CORE else version_of(entry.package or entry.requires),
            "targets": list(entry.targets),
            "install": entry.install,
        }
        for entry in runtimes()
    }
    return {
        "edgelm": edgelm.__version__,
        "python": platform.python_version(),
        "packages": {name: version_of(name) for name in (*CORE, *EXPORT_PACKAGES)},
        "runtimes": found,
        "providers": providers(),
        "native_quantizer": native_quantizer(),
        "native_operators": native_operators(),
        "gpu": gpu,
        "gpu_compiler": gpu_compiler(),
        "tensorrt": tensorrt_editions(),
        "device": devices.describe().as_dict(),
        "disk": disk(),
    }


def disk() -> dict[str, Any]:
    """Return the current folder and the size of its disk in bytes, None where the system does not say."""
    import shutil
    from pathlib import Path

    try:
        folder = Path.cwd()
        usage = shutil.disk_usage(folder)
    except OSError:  # such as a folder that was removed
        return {"folder": ".", "total": None, "free": None}
    return {"folder": str(folder), "total": usage.total, "free": usage.free}


def _needs_gpu(entry: RuntimeEntry) -> bool:
    return "cpu" not in entry.targets and not entry.only_by_name


def providers() -> list[str]:
    """Return the names of ONNX Runtime's execution providers."""
    if importlib.util.find_spec("onnxruntime") is None:
        return []
    module = importlib.import_module("onnxruntime")
    return [str(name) for name in module.get_available_providers()]


def native_quantizer() -> bool:
    """Return whether the compiled quantisation kernel is installed; without it NumPy is used, which is far slower."""
    from edgelm.quant import native

    return native.library() is not None


def native_operators() -> dict[str, Any]:
    """Return the library of native operators and the instruction set it uses; or why there is none."""
    from edgelm.errors import RuntimeUnavailableError
    from edgelm.runtimes.onnxruntime.native_library import describe_cpu

    try:
        found = describe_cpu()
    except RuntimeUnavailableError as error:  # report one damaged part and go on
        return {"library": None, "instruction_set": None, "why": str(error)}
    return {"library": found.library, "instruction_set": found.chosen, "why": found.why}


def gpus() -> dict[str, Any]:
    """Return the usable NVIDIA GPUs and the CUDA version of their driver; or why there are none."""
    from edgelm.errors import DeviceError
    from edgelm.runtimes.cuda.driver import chosen_index, find_devices

    try:
        devices = find_devices()
        chosen_index(len(devices))
    except DeviceError as error:
        return {"devices": [], "driver": None, "why": str(error)}
    found = [
        {
            "name": info.name,
            "sm": info.sm,
            "multiprocessors": info.multiprocessors,
            "memory": info.memory,
        }
        for info in devices
    ]
    return {"devices": found, "driver": "{}.{}".format(*devices[0].driver), "why": None}


def gpu_compiler() -> dict[str, Any]:
    """Return the versions of NVRTC, which exports for GPUs need, with the targets that each compiles; or why none can
    be loaded."""
    from edgelm.errors import DeviceError, ExportError
    from edgelm.runtimes.cuda.kernels import nvrtc

    try:
        libraries = nvrtc.installed()
    except DeviceError as error:
        return {"libraries": {}, "lacking": [], "why": str(error)}
    targets: dict[str, list[str]] = {library.path: [] for library in libraries}
    lacking = []
    for target in (*(f"sm_{sm}" for sm in nvrtc.SMS), nvrtc.PTX_TARGET):
        try:
            targets[nvrtc.load(target).path].append(target)
        except ExportError:
            lacking.append(target)
    found = {one.path: {"version": one.version_text, "targets": targets[one.path]} for one in libraries}
    return {"libraries": found, "lacking": lacking, "why": None}


def tensorrt_editions() -> list[dict[str, Any]]:
    """Return the installed TensorRT editions, and the SMs that each builds engines for on any machine."""
    from edgelm.errors import RuntimeUnavailableError
    from edgelm.runtimes.tensorrt import library

    found: list[dict[str, Any]] = []
    for edition, version in library.installed().items():
        try:
            loaded = library.load(edition)
        except RuntimeUnavailableError as error:
            found.append({"flavour": edition, "version": version, "sms": [], "why": str(error)})
        else:
            found.append({"flavour": edition, "version": version, "sms": list(loaded.sms), "why": None})
    return found


def sections(document: dict[str, Any], *, verbose: bool) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return the rows for people under their headings; packages only with `verbose` or where one is missing."""
    runtimes = [(name, runtime_line(entry, document["gpu"])) for name, entry in document["runtimes"].items()]
    packages = [("Packages", package_rows(document))] if verbose or _missing_core(document) else []
    return [
        ("What EdgeLM can do here", ability_rows(document, verbose=verbose)),
        ("This machine", machine_rows(document)),
        ("Runtimes", runtimes),
        *packages,
    ]


def sentence(document: dict[str, Any]) -> str:
    """Return what EdgeLM can do here in one sentence."""
    targets = list(dict.fromkeys(t for e in document["runtimes"].values() if e["usable"] for t in e["targets"]))
    if not targets:
        return "EdgeLM cannot run any bundle here: no runtime can be used."
    exports = all(document["packages"][name] for name in EXPORT_PACKAGES)
    more = ", and export checkpoints" if exports else "; it cannot export checkpoints"
    return f"EdgeLM can run bundles for {' and '.join(targets)} here{more}."


def _missing_core(document: dict[str, Any]) -> list[str]:
    return [name for name in CORE if document["packages"][name] is None]


def machine_rows(document: dict[str, Any]) -> list[tuple[str, str]]:
    """Return rows about system, CPU, memory, disk and GPUs."""
    from edgelm.sizes import format_size

    device, disk, gpu = document["device"], document["disk"], document["gpu"]
    graphics = [
        ("GPU", f"{found['name']}, SM {found['sm']}, {format_size(found['memory'])}, driver for CUDA {gpu['driver']}")
        for found in gpu["devices"]
    ]
    return [
        ("system", f"{device['system']}, {device['architecture']}"),
        ("CPU", device["cpu"]),
        (
            "cores",
            f"{device['allowed_cores']} may be used, of {device['physical_cores']} physical and "
            f"{device['logical_cores']} logical",
        ),
        ("instructions", " ".join(device["instruction_sets"]) or "unknown"),
        ("memory", f"{format_size(device['memory_total'])}, {format_size(device['memory_available'])} available"),
        ("disk", f"{format_size(disk['free'])} free of {format_size(disk['total'])}, in {disk['folder']}"),
        *(graphics or [("GPU", f"none: {gpu['why']}")]),
    ]


def ability_rows(document: dict[str, Any], *, verbose: bool) -> list[tuple[str, str]]:
    """Return rows about what works here and how to install the rest; GPU parts only with a GPU or `verbose`."""
    missing = [name for name in EXPORT_PACKAGES if document["packages"][name] is None]
    export = "yes"
    if missing:
        export = f"no: missing {', '.join(missing)} (only needed to export): {install_hint('export')}"
    operators, compiler = document["native_operators"], document["gpu_compiler"]
    kernels = operators["instruction_set"]
    rows = [
        ("run", _runs(document)),
        ("operators", f"compiled, {kernels}: {operators['why']}" if kernels else operators["why"]),
        ("export", export),
        (
            "quantize",
            "yes, compiled"
            if document["native_quantizer"]
            else "NumPy only, slow: install a wheel with compiled parts",
        ),
    ]
    if not verbose and not document["gpu"]["devices"]:
        return rows
    return [
        *rows,
        ("GPU kernels", compiler_line(compiler)),
        *((f"{entry['flavour']} engines", tensorrt_line(entry)) for entry in document["tensorrt"]),
    ]


def compiler_line(compiler: dict[str, Any]) -> str:
    """Return which version of NVRTC compiles the kernels for which devices."""
    if compiler["why"]:
        return f"cannot be exported: {compiler['why']}"
    used = [one for one in compiler["libraries"].values() if one["targets"]]
    made = "; ".join(f"NVRTC {one['version']} for {', '.join(one['targets'])}" for one in used)
    lacking = (
        f"; none for {', '.join(compiler['lacking'])}: {install_hint('gpu-export')}" if compiler["lacking"] else ""
    )
    return f"compiled by {made}{lacking}"


def _runs(document: dict[str, Any]) -> str:
    """Return the targets whose bundles run here, each with the runtime that is chosen."""
    chosen: dict[str, str] = {}
    for name, entry in document["runtimes"].items():
        for target in entry["targets"] if entry["usable"] else ():
            chosen.setdefault(target, name)
    if not chosen:
        return "nothing: no runtime can be used, see Runtimes below"
    return ", ".join(f"bundles for {target} with {name}" for target, name in chosen.items())


def runtime_line(entry: dict[str, Any], gpu: dict[str, Any]) -> str:
    """Return the state of a runtime, and what it is."""
    state = f"missing: {entry['install']}"
    if entry["available"]:
        without = ", but there is no GPU" if entry["needs_gpu"] and not gpu["devices"] else ""
        version = f", {entry['version']}" if entry["version"] else ""
        state = entry["problem"] or f"ready{version}{without}"
    return f"{state} ({entry['summary']}, for {', '.join(entry['targets'])})"


def package_rows(document: dict[str, Any]) -> list[tuple[str, str]]:
    """Return rows about versions of packages."""
    packages = document["packages"]
    found = ", ".join(f"{name} {version}" for name, version in packages.items() if version)
    lines = [("edgelm", f"{document['edgelm']}, Python {document['python']}"), ("with", found)]
    lines.append(("providers", ", ".join(document["providers"]) or "none"))
    missing = _missing_core(document)
    return [*lines, ("missing", f"{', '.join(missing)}: pip install {' '.join(missing)}")] if missing else lines


def tensorrt_line(entry: dict[str, Any]) -> str:
    """Return which engines an installed TensorRT builds."""
    if entry["why"]:
        return str(entry["why"])
    sms = ", ".join(map(str, entry["sms"]))
    where = f"SM {sms} on any machine" if sms else "the GPU of this machine alone"
    return f"{entry['version']}, builds engines for {where}"


def text(document: dict[str, Any], *, verbose: bool = False) -> str:
    """Format the document for people: a sentence, then the sections with aligned rows."""
    from edgelm.cli.common.output import pairs

    found = sections(document, verbose=verbose)
    lines = iter(pairs([row for _, rows in found for row in rows]).splitlines())
    blocks = (f"{title}\n" + "\n".join(f"  {next(lines)}" for _ in rows) for title, rows in found)
    return "\n\n".join([sentence(document), *blocks])
