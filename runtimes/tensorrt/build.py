"""Builds engines of a bundle: `edgelm build`, and the last step of `edgelm export --target tensorrt`.

An engine is built in a folder beside the bundle's files, renamed into `engines/`, and only then added to the manifest,
which is replaced atomically. So the bundle stays valid whatever happens. Files that a killed build leaves are not in
the manifest; the next build removes them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgelm.bundle import ENGINE_TEMP_PREFIX, MANIFEST, Bundle, FileInfo, build_leftovers, sha256_of
from edgelm.errors import BundleError, ExportError
from edgelm.files import atomic_file, disk_full_explained, lock_folder, require_disk_space, sync, sync_folder
from edgelm.json_dataclass import ErrorFactory, from_data, read_json, require_format
from edgelm.progress import Progress, Silent
from edgelm.runtimes.cuda.driver import chosen_device, current_gpu
from edgelm.runtimes.cuda.kernels.images import FOLDER as KERNELS
from edgelm.runtimes.cuda.kernels.images import KernelFolder
from edgelm.runtimes.tensorrt import rowmajor
from edgelm.runtimes.tensorrt.builder import BuildOptions, GraphShape, build_engine, check_sms
from edgelm.runtimes.tensorrt.engine_info import FOLDER, EngineInfo, engine_name, engines, sm_names
from edgelm.runtimes.tensorrt.library import FULL, Library, load
from edgelm.runtimes.tensorrt.plugins import PluginLibrary, library_name, write_library
from edgelm.runtimes.tensorrt.rowmajor import Rows

GRAPH_FILE = "model.tensorrt.onnx"
RECIPE_FILE = "model.tensorrt.json"
ROWS_FILE = "model.rows.data"
"""Row-major matrices; the file exists only while an engine is built."""
_FORMAT = 1
_FP8_SM = 89
_ERRORS = ErrorFactory(BundleError, "export the bundle again")


@dataclass(frozen=True)
class GraphRecipe:
    """The contents of `model.tensorrt.json`, which describes the graph for TensorRT.

    Attributes:
        shape: the builder's parameters.
        fp8: whether the graph has FP8 matmuls, which need SM 89 or newer.
        rows: matrices that must be unpacked to rows.
    """

    shape: GraphShape
    fp8: bool
    rows: list[Rows]

    def to_json(self) -> str:
        """Return the JSON that `read` reads."""
        data = {"format": _FORMAT, **dataclasses.asdict(self.shape), "fp8": self.fp8}
        return json.dumps(data | {"rows": [dataclasses.asdict(entry) for entry in self.rows]}, indent=1) + "\n"

    @classmethod
    def read(cls, path: Path) -> GraphRecipe:
        """Read the file.

        Raises:
            BundleError: it is missing, damaged or of another version.
        """
        data = require_format(read_json(path, _ERRORS), "format", _FORMAT, path, _ERRORS)
        shape = {item.name: data[item.name] for item in dataclasses.fields(GraphShape) if item.name in data}
        rest = {name: value for name, value in data.items() if name not in shape and name != "format"}
        recipe = from_data(cls, {"shape": shape, **rest}, path, _ERRORS)
        for entry in recipe.rows:
            entry.check(path)
        return recipe


def build_bundle(
    bundle: Bundle,
    options: BuildOptions,
    *,
    edition: str | None = None,
    progress: Progress | None = None,
) -> EngineInfo:
    """Build an engine of a bundle and add it. It replaces one of the same edition and devices.

    `options.sms`: for TensorRT-RTX the devices to build for, by default the local GPU, or without one those that the
    bundle has kernels for. Full TensorRT builds only for the local GPU.

    Raises:
        ExportError: the bundle is for another target, or TensorRT cannot build it.
        RuntimeUnavailableError: TensorRT is not installed.
        DeviceError: full TensorRT is used without a GPU.
        EdgeLMError: another process is writing the bundle.
    """
    progress = progress or Silent()
    manifest = bundle.manifest
    if manifest.target != "tensorrt":
        raise ExportError(
            f"{bundle.path} was exported for {manifest.target}, and engines need a bundle that was exported with "
            "--target tensorrt"
        )
    library = load(edition)
    sms = chosen_sms(library, options.sms, bundle.path)
    with lock_folder(bundle.path, f"another run is writing {bundle.path}: wait for it"):
        bundle = Bundle.open(bundle.path)  # another build may have added to it
        _remove_left(bundle.path)
        try:
            return _add(bundle, library, options, sms, progress)
        finally:
            # Keep the files in the manifest: the new engine, or after an error the old one.
            try:
                _remove_left(bundle.path)
            except BaseException:
                _remove_left(bundle.path)  # Ctrl-C while cleaning up
                raise


def _add(
    bundle: Bundle, library: Library, options: BuildOptions, sms: tuple[int, ...], progress: Progress
) -> EngineInfo:
    manifest = bundle.manifest
    made = build_into(bundle.path, manifest.graph.weights_file, library, options, sms, progress)
    old = [info for info in engines(bundle) if (info.edition, info.sms) == (made.edition, made.sms)]
    gone = {name for info in old for name in (info.file, _description(info.file))} - {made.file}
    gone |= {info.library for info in old} - {info.library for info in engines(bundle) if info not in old}
    files = {name: info for name, info in manifest.files.items() if name not in gone}
    for name in (made.file, _description(made.file), made.library):
        path = bundle.file(name)
        files[name] = FileInfo(path.stat().st_size, sha256_of(path))
    with atomic_file(bundle.file(MANIFEST)) as path:
        path.write_text(dataclasses.replace(manifest, files=files).to_json(), encoding="utf-8", newline="\n")
    return made


def _remove_left(folder: Path) -> None:
    for path in build_leftovers(folder):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def chosen_sms(library: Library, asked: Sequence[int], folder: Path) -> tuple[int, ...]:
    """Return the devices to build for; see `build_bundle`, also for errors."""
    if library.edition == FULL:
        here = chosen_device().sm
        if asked and tuple(asked) != (here,):
            raise ExportError(
                f"full TensorRT builds only for the GPU of this machine, SM {here}, not for "
                f"{sm_names(asked)}: leave --sm out, or use TensorRT-RTX (--edition tensorrt-rtx)"
            )
        return (here,)
    if asked:
        check_sms(library, asked)
        return tuple(asked)
    has = (int(target.removeprefix("sm_")) for target in KernelFolder(folder / KERNELS).files if "sm_" in target)
    found = tuple(sorted(set(has) & set(library.sms)))
    check_sms(library, found)
    return found


def build_into(
    folder: Path,
    weights_file: str,
    library: Library,
    options: BuildOptions,
    sms: tuple[int, ...],
    progress: Progress,
) -> EngineInfo:
    """Build an engine of the graph in `folder` (a bundle) into its `engines/`. The manifest is not changed.

    Raises:
        ExportError: TensorRT cannot build it for these devices.
        BundleError: the bundle has no graph for TensorRT.
    """
    recipe = GraphRecipe.read(folder / RECIPE_FILE)
    old = [sm for sm in sms if sm < _FP8_SM]
    if recipe.fp8 and old:
        raise ExportError(
            f"{folder / GRAPH_FILE} has FP8 matmuls, which SM {old[0]} does not support: export the bundle again with "
            f"--sm {old[0]}, so that a plugin computes them"
        )
    weights = folder / weights_file
    require_disk_space(
        folder / FOLDER, weights.stat().st_size + 2 * sum(entry.nbytes for entry in recipe.rows) + (16 << 20)
    )
    (folder / FOLDER).mkdir(exist_ok=True)
    stem = _free_name(folder, engine_name(library.edition, sms, library.version))
    target = folder / FOLDER / f"{stem}.engine"
    task = progress.task("building an engine", 1, unit="steps")
    with _workplace(folder) as work, disk_full_explained(target), task as advance:
        # The parser reads weights only from the graph's folder.
        (work / GRAPH_FILE).symlink_to((folder / GRAPH_FILE).absolute())
        (work / weights_file).symlink_to(weights.absolute())
        rowmajor.write(recipe.rows, weights, work / ROWS_FILE)
        asked = dataclasses.replace(options, sms=sms)
        write_library(KernelFolder(folder / KERNELS), work / "library")
        plugins = PluginLibrary(work / "library")
        # Full TensorRT builds for the current GPU, by measuring on it.
        with current_gpu() if library.edition == FULL else contextlib.nullcontext():
            made = build_engine(library, work / GRAPH_FILE, work / "engine", recipe.shape, asked, plugins, sms)
        made = dataclasses.replace(
            made, file=f"{FOLDER}/{target.name}", library=f"{FOLDER}/{library_name(plugins.path)}"
        )
        (work / "description").write_text(made.to_json(), encoding="utf-8", newline="\n")
        places = (("library", folder / made.library), ("description", folder / _description(made.file)))
        for name, place in (*places, ("engine", target)):
            sync(work / name)
            (work / name).rename(place)
        sync_folder(target.parent)
        advance(1)
    return made


def _description(engine: str) -> str:
    return engine.removesuffix(".engine") + ".json"


def _free_name(folder: Path, stem: str) -> str:
    """Return an unused file name. A replaced engine stays in the manifest until the new one is added."""
    names = [stem, *(f"{stem}-{i}" for i in range(2, 100))]
    return next(name for name in names if not (folder / FOLDER / f"{name}.engine").exists())


@contextlib.contextmanager
def _workplace(folder: Path) -> Iterator[Path]:
    """Create a temporary folder on the bundle's disk; remove it afterwards."""
    work = Path(tempfile.mkdtemp(prefix=ENGINE_TEMP_PREFIX, dir=folder))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
