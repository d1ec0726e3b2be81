"""The compiled kernels of a bundle: a folder `kernels` with one image per target, described by `kernels.json`.

    kernels/sm_86.cubin ... kernels/compute_80.ptx   kernels/kernels.json

The bundle's manifest has the hashes of these files.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from edgelm.devices import allowed_cores
from edgelm.errors import BundleError, DeviceError, ExportError, RuntimeUnavailableError
from edgelm.json_dataclass import Count, ErrorFactory, Range, from_data, quoted, read_json, require_format
from edgelm.progress import Progress, Silent
from edgelm.runtimes.cuda import planning
from edgelm.runtimes.cuda.kernels import nvrtc, sources
from edgelm.runtimes.cuda.kernels.cubin import Resources

__all__ = [
    "FOLDER",
    "PREPARED_VARIABLE",
    "Image",
    "KernelCompiler",
    "KernelFolder",
    "bundle_targets",
    "choose",
    "compilable",
    "compile_bundle_kernels",
    "compile_images",
    "prepared_kernels",
]

FOLDER = "kernels"
PREPARED_VARIABLE = "EDGELM_GPU_KERNELS"
"""Environment variable: a folder of kernels that were compiled beforehand from the same sources, for machines that have
a GPU for minutes only (tests/gpu/check.py --prepare writes one)."""
INDEX = "kernels.json"
FORMAT = 2
_TARGET = re.compile(r"(sm|compute)_[1-9][0-9]{1,2}")
_ERRORS = ErrorFactory(BundleError, "copy the bundle again")
_Version = Annotated[int, Range(0, 10_000)]


@dataclass(frozen=True, kw_only=True)
class _ImageInfo:
    """One image in `kernels.json`. `nvrtc` is the version that compiled it, `waits` are the kernels of `Image.pdl`."""

    file: str
    nvrtc: tuple[_Version, _Version]
    waits: tuple[str, ...] = ()
    resources: dict[str, Resources]


@dataclass(frozen=True, kw_only=True)
class _Index:
    """The contents of `kernels.json`. In format 1 one version of NVRTC stood here, for all images."""

    format: int
    source: str = ""
    argument_bytes: dict[str, Count]
    images: dict[str, _ImageInfo]


@dataclass(frozen=True)
class Image:
    """A compiled image, which the driver loads.

    Attributes:
        target: `sm_86` or `compute_80`.
        data: a cubin or PTX text.
        argument_bytes: bytes of each kernel's parameters, by name of the kernel.
        compiler: version of the NVRTC that compiled it.
        pdl: kernels that support programmatic dependent launch; see `nvrtc.Compiled`.
    """

    target: str
    data: bytes
    argument_bytes: Mapping[str, int]
    compiler: tuple[int, int]
    pdl: frozenset[str] = frozenset()


def compile_images(
    names: Sequence[str], targets: Sequence[str], progress: Progress | None = None
) -> dict[str, nvrtc.Compiled]:
    """Compile kernels for several targets in parallel, or use prepared ones.

    Raises:
        ExportError: a kernel does not compile, or no installed NVRTC supports a target.
        DeviceError: NVRTC is not installed, and a kernel is not a prepared one.
    """
    folder = prepared_kernels()
    ready = {target for target in targets if folder is not None and folder.has(names, target)}
    for target in targets:
        if target not in ready:
            nvrtc.load(target)
    source, headers = sources.translation_unit(names)
    done: dict[str, nvrtc.Compiled] = {}

    def one(target: str) -> nvrtc.Compiled:
        if folder is not None and target in ready:
            return folder.compiled(names, target)
        return nvrtc.compile_kernels(source, headers, target, names)

    with (
        (progress or Silent()).task("compiling GPU kernels", len(targets), unit="steps") as advance,
        ThreadPoolExecutor(min(allowed_cores(), len(targets)) or 1) as pool,
    ):
        futures = [pool.submit(one, target) for target in targets]
        try:
            for target, future in zip(targets, futures, strict=True):
                done[target] = future.result()
                advance(1)
        finally:
            pool.shutdown(cancel_futures=True)
    return done


def bundle_targets(sms: Sequence[int], *, ptx: bool = True) -> list[str]:
    """Return the targets to compile for these SMs, and with `ptx` for later ones."""
    return [*dict.fromkeys(f"sm_{sm}" for sm in sms), *([nvrtc.PTX_TARGET] if ptx else [])]


def compile_bundle_kernels(
    names: Sequence[str], sms: Sequence[int], folder: Path, progress: Progress | None = None, *, ptx: bool = True
) -> None:
    """Compile kernels for these SMs, and with `ptx` as PTX for later ones, into `folder`, which is created if absent.

    Raises:
        ExportError: a kernel does not compile, spills registers, or no installed NVRTC supports an SM.
        DeviceError: NVRTC is not installed.
    """
    targets = bundle_targets(sms, ptx=ptx)
    compiled = compile_images(names, targets, progress)
    for target, one in compiled.items():
        for name, used in one.resources.items():
            if used.local_bytes:
                raise ExportError(f"{name} spills {used.local_bytes} bytes per thread on {target}: report this bug")
    folder.mkdir(parents=True, exist_ok=True)
    images = {}
    for target, one in compiled.items():
        file = f"{target}.{'ptx' if target == nvrtc.PTX_TARGET else 'cubin'}"
        (folder / file).write_bytes(one.image)
        images[target] = _ImageInfo(
            file=file, nvrtc=one.compiler, waits=tuple(sorted(one.pdl)), resources=one.resources
        )
    index = _Index(
        format=FORMAT,
        source=sources.fingerprint(*sources.translation_unit(names)),
        argument_bytes=dict(sorted(compiled[targets[0]].argument_bytes.items())),
        images=images,
    )
    (folder / INDEX).write_text(json.dumps(asdict(index), indent=1) + "\n", encoding="utf-8", newline="\n")


def compilable() -> dict[str, tuple[int, int]]:
    """Return the targets that this machine compiles for, PTX last, with the version of NVRTC for each.

    Raises:
        DeviceError: NVRTC is not installed.
    """
    sms = sorted({sm for library in nvrtc.installed() for sm in library.sms})
    return {target: nvrtc.load(target).version for target in bundle_targets(sms)}


class KernelFolder:
    """Reads the folder of compiled kernels. An image's bytes are read when it is chosen."""

    def __init__(self, folder: Path) -> None:
        """Open the folder and check `kernels.json`.

        Raises:
            BundleError: it is missing, damaged or has a newer format.
        """
        self.folder = folder
        path = folder / INDEX
        if not path.exists():
            raise BundleError(f"{path} is missing: the bundle holds no GPU kernels; export it again")
        index = from_data(_Index, _current(read_json(path, _ERRORS), path), path, _ERRORS)
        for target, image in index.images.items():
            if not _TARGET.fullmatch(target):
                raise _ERRORS.at(path, f"images has {quoted(target)}, expected a name like sm_86 or compute_80")
            if not re.fullmatch(r"\w[\w.-]*", image.file, re.ASCII):
                raise _ERRORS.at(path, f"images.{target}.file is {quoted(image.file)}, expected a file beside it")
        self.compilers = {target: image.nvrtc for target, image in index.images.items()}
        self.source = index.source
        self.argument_bytes = index.argument_bytes
        self.files = {target: image.file for target, image in index.images.items()}
        self.pdl = {target: frozenset(image.waits) for target, image in index.images.items()}
        self.resources = {target: image.resources for target, image in index.images.items()}

    def image(self, names: Sequence[str], capability: tuple[int, int], driver: tuple[int, int]) -> Image:
        """Return the best image for a device.

        Args:
            names: kernels that the image must have.
            capability: of the device, e.g. (8, 6).
            driver: the CUDA version that its driver supports.

        Raises:
            RuntimeUnavailableError: no image runs on the device, or a kernel is missing.
        """
        missing = [name for name in names if name not in self.argument_bytes]
        if missing:
            raise RuntimeUnavailableError(
                f"{self.folder} lacks the kernel {missing[0]} (of {len(missing)}): it was exported by another version "
                "of edgelm; export it again"
            )
        return self.read(choose(self.compilers, capability, driver))

    def read(self, target: str) -> Image:
        """Return the image of a target. Raises BundleError if it cannot be read."""
        path = self.folder / self.files[target]
        try:
            return Image(target, path.read_bytes(), self.argument_bytes, self.compilers[target], self.pdl[target])
        except OSError as error:
            raise BundleError(f"{path} cannot be read ({error.strerror}): copy the bundle again") from error

    def has(self, names: Sequence[str], target: str) -> bool:
        """Whether the folder has all these kernels for a target."""
        return target in self.files and all(name in self.argument_bytes for name in names)

    def compiled(self, names: Sequence[str], target: str) -> nvrtc.Compiled:
        """Return an image as a compiler result for these kernels. Raises OSError if it cannot be read."""
        return nvrtc.Compiled(
            target,
            (self.folder / self.files[target]).read_bytes(),
            {name: self.argument_bytes[name] for name in names},
            self.pdl[target] & set(names),
            {name: used for name, used in self.resources[target].items() if name in names},
            "",
            self.compilers[target],
        )


def _current(data: Any, path: Path) -> dict[str, Any]:
    """Return a document in the current format. Format 1 has one version of NVRTC for all images."""
    if not (isinstance(data, dict) and type(data.get("format")) is int and data["format"] == 1):
        return require_format(data, "format", FORMAT, path, _ERRORS)
    images = data.get("images")
    if "nvrtc" not in data or not isinstance(images, dict):
        raise _ERRORS.at(path, f"{'images' if 'nvrtc' in data else 'nvrtc'} is missing")
    version = data["nvrtc"]
    added = {key: {**image, "nvrtc": version} if isinstance(image, dict) else image for key, image in images.items()}
    return {key: value for key, value in data.items() if key != "nvrtc"} | {"format": FORMAT, "images": added}


def prepared_kernels() -> KernelFolder | None:
    """Return the folder that `PREPARED_VARIABLE` names, or None.

    Raises:
        BundleError: it is damaged, or was compiled from other sources.
    """
    named = os.environ.get(PREPARED_VARIABLE)
    if not named:
        return None
    folder = KernelFolder(Path(named))
    if folder.source != sources.fingerprint(*sources.translation_unit(sorted(folder.argument_bytes))):
        raise BundleError(
            f"{PREPARED_VARIABLE}={named}: these kernels were compiled from other sources: compile them again with "
            "`python tests/gpu/check.py --prepare FOLDER`, or unset the variable"
        )
    return folder


class KernelCompiler:
    """Compiles kernels with the NVRTC of this machine, for tests and measurements without a bundle.

    Kernels of the folder that `PREPARED_VARIABLE` names are used where it has them; then NVRTC is not needed.
    """

    def image(self, names: Sequence[str], capability: tuple[int, int], driver: tuple[int, int]) -> Image:
        """Compile kernels for a device; see `KernelFolder.image`."""
        folder = prepared_kernels()
        if folder is not None and folder.has(names, "sm_{}{}".format(*capability)):
            return folder.image(names, capability, driver)
        (compiled,) = compile_images(names, [choose(compilable(), capability, driver)]).values()
        return Image(compiled.target, compiled.image, compiled.argument_bytes, compiled.compiler, compiled.pdl)


def choose(images: Mapping[str, tuple[int, int]], capability: tuple[int, int], driver: tuple[int, int]) -> str:
    """Return the best image for a device: of its own SM, of an earlier SM of its generation, or PTX.

    The rules are in C++ (csrc/cuda/driver/kernel_images.h), since plugins choose too.

    Args:
        images: the version of the NVRTC that compiled each image, by target.
        capability: of the device, e.g. (8, 6).
        driver: the CUDA version that its driver supports.

    Raises:
        RuntimeUnavailableError: the device runs none of them, or its driver is too old for those that it runs.
    """
    text = "{}.{}".format
    fields: dict[str, planning.Field] = {
        "images": " ".join(f"{target}:{text(*version)}" for target, version in images.items()),
        "sm": capability[0] * 10 + capability[1],
        "driver": text(*driver),
    }
    try:
        return planning.call("choose_image", fields).decode()
    except DeviceError as error:
        raise RuntimeUnavailableError(str(error)) from error
