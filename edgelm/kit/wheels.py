"""Wheels for another machine: which ones a kit needs, and where they come from: a folder, the cache, or pip."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from email.parser import HeaderParser
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from edgelm.errors import EdgeLMError
from edgelm.installing import install_hint
from edgelm.progress import Progress, Silent
from edgelm.system.platforms import Platform

if TYPE_CHECKING:
    from packaging.requirements import Requirement

NOT_IMPORTED = {"huggingface-hub": "tokenizers asks for it, to download; that and its own packages are 7 MB"}
"""Packages that the metadata of others asks for and that running a bundle never imports, with the reason."""
_FILE = re.compile(r"(?P<name>[^-/]+)-(?P<version>[^-/]+)(-\d[^-/]*)?-(?P<tags>[^-/]+-[^-/]+-[^-/]+)\.whl")
_PIP_SECONDS = 1800


@dataclass(frozen=True)
class Target:
    """What wheels are for: a platform and a minor version of Python 3."""

    platform: Platform
    minor: int

    @property
    def python(self) -> str:
        """The version of Python, such as "3.11"."""
        return f"3.{self.minor}"

    @cached_property
    def tags(self) -> dict[str, int]:
        """Tags of wheels that can be installed, such as cp311-abi3-win_amd64, with their rank: the lowest is best."""
        minors = range(self.minor, 1, -1)
        pythons = [f"cp3{self.minor}-cp3{self.minor}", *(f"cp3{minor}-abi3" for minor in minors)]
        pythons += [f"cp3{self.minor}-none", *(f"py3{minor}-none" for minor in minors), "py3-none"]
        platforms = (*self.platform.pip_tags, "any")
        return {tag: rank for rank, tag in enumerate(f"{python}-{one}" for python in pythons for one in platforms)}

    def environment(self) -> dict[str, str]:
        """Return the values of environment markers there."""
        system, _, cpu = self.platform.name.partition("-")
        sys_platform, platform_system, os_name = {
            "linux": ("linux", "Linux", "posix"),
            "macos": ("darwin", "Darwin", "posix"),
            "windows": ("win32", "Windows", "nt"),
        }[system]
        return {
            "implementation_name": "cpython",
            "implementation_version": f"{self.python}.0",
            "os_name": os_name,
            "platform_machine": "AMD64" if system == "windows" else cpu,
            "platform_python_implementation": "CPython",
            "platform_release": "",
            "platform_system": platform_system,
            "platform_version": "",
            "python_full_version": f"{self.python}.0",
            "python_version": self.python,
            "sys_platform": sys_platform,
        }


@dataclass(frozen=True)
class Wheel:
    """A wheel on disk."""

    path: Path
    name: str
    version: str
    tags: tuple[str, ...]

    @classmethod
    def at(cls, path: Path) -> Wheel | None:
        """Return the wheel at a path, None where its name is not that of a wheel."""
        match = _FILE.fullmatch(path.name)
        if match is None:
            return None
        pythons, abis, platforms = (part.split(".") for part in match["tags"].split("-"))
        tags = tuple(f"{python}-{abi}-{one}" for python in pythons for abi in abis for one in platforms)
        return cls(path, normalized(match["name"]), match["version"], tags)

    def rank(self, target: Target) -> int | None:
        """Return how well the wheel suits a target, 0 is best; None where it cannot be installed."""
        return min((target.tags[tag] for tag in self.tags if tag in target.tags), default=None)

    @property
    def glibc(self) -> tuple[int, int] | None:
        """The oldest glibc of Linux that it loads with; None where it names none."""
        found = [re.search(r"manylinux_(\d+)_(\d+)_", tag) for tag in self.tags]
        return min(((int(one[1]), int(one[2])) for one in found if one), default=None)

    def metadata(self) -> tuple[list[str], str]:
        """Return the requirements, and the versions of Python it is for.

        Raises:
            EdgeLMError: the file is damaged.
        """
        with self._archive() as archive:
            damaged = archive.testzip()
            names = [name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name)]
            if damaged is not None or len(names) != 1:
                raise zipfile.BadZipFile(damaged or "no METADATA")
            parsed = HeaderParser().parsestr(archive.read(names[0]).decode("utf-8"))
        return parsed.get_all("Requires-Dist", []), parsed.get("Requires-Python", "")

    def holds(self, beginning: str) -> bool:
        """Return whether a file in it has a name that begins so.

        Raises:
            EdgeLMError: the file is damaged.
        """
        with self._archive() as archive:
            return any(name.startswith(beginning) for name in archive.namelist())

    @contextlib.contextmanager
    def _archive(self) -> Iterator[zipfile.ZipFile]:
        try:
            with zipfile.ZipFile(self.path) as archive:
                yield archive
        # zipfile's NotImplementedError: a damaged header asks for a compression that it does not know.
        except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            raise EdgeLMError(f"{self.path} is damaged ({error}): remove it, and make or download it again") from error


def normalized(name: str) -> str:
    """Return a package's name as it is compared: in lower case, with hyphens."""
    return re.sub(r"[-_.]+", "-", name).lower()


def wheels_in(folder: Path) -> list[Wheel]:
    """Return the wheels of a folder, in the order of their names."""
    paths = sorted(folder.glob("*.whl")) if folder.is_dir() else []
    return [wheel for path in paths if (wheel := Wheel.at(path)) is not None]


def cache_folder() -> Path:
    """Return the folder where downloaded wheels are kept; XDG_CACHE_HOME moves it."""
    given = os.environ.get("XDG_CACHE_HOME") or (os.environ.get("LOCALAPPDATA") if os.name == "nt" else None)
    return (Path(given) if given else Path.home() / ".cache") / "edgelm" / "wheels"


class WheelSource:
    """Finds the wheels that a kit needs.

    Args:
        folder: the only place to look in; None for the cache, and pip for what it lacks.
        progress: where to report downloads and versions other than those installed here.
    """

    def __init__(self, folder: Path | None = None, progress: Progress | None = None) -> None:
        if folder is not None and not folder.is_dir():
            raise EdgeLMError(
                f"there is no folder {folder}: --wheels names the folder with all wheels but EdgeLM's; without it pip "
                "downloads them"
            )
        self.folder = folder
        self.progress = progress or Silent()

    def closure(self, ours: Wheel, extra: str | None, target: Target) -> list[Wheel]:
        """Return our wheel and all that it needs there, in the order of their names.

        Args:
            ours: the wheel of EdgeLM.
            extra: its extra that runs the bundle; None for none.
            target: the platform and Python.

        Raises:
            EdgeLMError: a wheel is missing, or this needs a package that is not installed here.
        """
        chosen = {ours.name: ours}
        pending = list(_requirements(ours, (extra,) if extra else (), target))
        while pending:
            wanted = {
                normalized(one.name): one
                for one in pending
                if normalized(one.name) not in chosen and normalized(one.name) not in NOT_IMPORTED
            }
            found = self._get(list(wanted.values()), target)
            chosen |= found
            pending = [
                need
                for name, requirement in wanted.items()
                for need in _requirements(found[name], tuple(requirement.extras), target)
            ]
        return [chosen[name] for name in sorted(chosen)]

    def get(self, wanted: Sequence[Requirement], target: Target) -> list[Wheel]:
        """Return a wheel for each requirement.

        Raises:
            EdgeLMError: there is none.
        """
        found = self._get(wanted, target)
        return [found[normalized(one.name)] for one in wanted]

    def _get(self, wanted: Sequence[Requirement], target: Target) -> dict[str, Wheel]:
        """Return a wheel for each requirement, by name: of the version installed here, if there is one."""
        exact = {normalized(one.name): _installed(one) for one in wanted}
        found: dict[str, Wheel] = {}
        for attempt in ("folder", "exact", "any"):
            missing = [one for one in wanted if normalized(one.name) not in found]
            if not missing:
                break
            if attempt == "folder":
                found |= _best(wheels_in(self.folder or cache_folder()), missing, exact, target)
                if self.folder is not None:
                    found |= _best(wheels_in(self.folder), missing, {}, target, but=found)
                    self._require_all(missing, found, exact, target)
            elif attempt == "exact":
                pinned = [one for one in missing if exact[normalized(one.name)]]
                self._download([f"{one.name}=={exact[normalized(one.name)]}" for one in pinned], target, must=False)
                found |= _best(wheels_in(cache_folder()), pinned, exact, target)
            else:
                made = self._download([str(_plain(one)) for one in missing], target, must=True)
                found |= _best(made, missing, {}, target)
                self._require_all(missing, found, exact, target)
        for name, wheel in found.items():
            if exact[name] not in (None, wheel.version):
                self.progress.note(
                    f"{name} {wheel.version} for Python {target.python}; installed here is {exact[name]}"
                )
        return found

    def _require_all(
        self, wanted: Sequence[Requirement], found: dict[str, Wheel], exact: dict[str, str | None], target: Target
    ) -> None:
        lacking = [one for one in wanted if normalized(one.name) not in found]
        if lacking:
            names = ", ".join(f"{one.name} {exact[normalized(one.name)] or one.specifier}".strip() for one in lacking)
            where = f"{self.folder} has" if self.folder else "the package index has"
            raise EdgeLMError(
                f"{where} no wheel of {names} for {target.platform.name} and Python {target.python}: "
                "choose other versions of Python with --python, or give a folder that has it with --wheels"
            )

    def _download(self, requirements: Sequence[str], target: Target, *, must: bool) -> list[Wheel]:
        """Download with pip into the cache; without `must`, return an empty list where pip finds no such wheel."""
        if not requirements:
            return []
        if importlib.util.find_spec("pip") is None:
            raise EdgeLMError(
                "wheels for another machine are downloaded with pip, which is not installed here: "
                "python -m ensurepip, or give a folder of wheels with --wheels"
            )
        cache = cache_folder()
        cache.mkdir(parents=True, exist_ok=True)
        self.progress.note(f"downloading for {target.platform.name}, Python {target.python}: {' '.join(requirements)}")
        with tempfile.TemporaryDirectory(dir=cache, prefix=".partial-") as folder:
            platforms = [part for tag in target.platform.pip_tags for part in ("--platform", tag)]
            command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "download", "--no-deps"]
            command += ["--only-binary=:all:", "--dest", folder, "--implementation", "cp"]
            command += ["--python-version", target.python, *platforms, *requirements]
            result = subprocess.run(
                command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=_PIP_SECONDS, check=False
            )
            if result.returncode and must:
                lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR: ")] or [result.stderr]
                raise EdgeLMError(
                    f"pip cannot download {', '.join(requirements)} for {target.platform.name} and Python "
                    f"{target.python} ({lines[-1].removeprefix('ERROR: ').strip()}): check the network, choose other "
                    "versions of Python with --python, or give a folder of wheels with --wheels"
                )
            made = sorted(Path(folder).glob("*.whl"))
            return [wheel for path in made if (wheel := Wheel.at(Path(shutil.move(path, cache / path.name))))]


def our_wheel(folders: Iterable[Path], version: str, platform: Platform) -> Wheel | None:
    """Return EdgeLM's wheel of this version for a platform from the first folder that has one, else the pure one."""
    target = Target(platform, platform.python)
    found = [
        (rank, wheel)
        for folder in folders
        for wheel in wheels_in(folder)
        if wheel.name == "edgelm" and wheel.version == version and (rank := wheel.rank(target)) is not None
    ]
    return min(found, key=lambda pair: pair[0])[1] if found else None


def is_pure(wheel: Wheel) -> bool:
    """Return whether a wheel is for any platform."""
    return all(tag.endswith("-any") for tag in wheel.tags)


def check_python(wheel: Wheel, target: Target) -> None:
    """Check that a wheel is for a version of Python.

    Raises:
        EdgeLMError: it is not.
    """
    from packaging.specifiers import SpecifierSet

    versions = wheel.metadata()[1]
    if not SpecifierSet(versions).contains(f"{target.python}.0"):
        raise EdgeLMError(f"EdgeLM needs Python {versions}: --python {target.python} cannot be packed")


def need_packaging() -> None:
    """Check that the package `packaging` is installed, which reads the requirements of wheels.

    Raises:
        EdgeLMError: it is not.
    """
    if importlib.util.find_spec("packaging") is None:
        raise EdgeLMError(f"`edgelm package` needs packaging, not installed here: {install_hint('export')}")


def _requirements(wheel: Wheel, extras: Sequence[str], target: Target) -> Iterator[Requirement]:
    """Yield what a wheel needs on a target, with these extras."""
    from packaging.requirements import Requirement

    environment = target.environment()
    for line in wheel.metadata()[0]:
        one = Requirement(line)
        if one.marker is None or any(
            one.marker.evaluate({**environment, "extra": extra}) for extra in (extras or ("",))
        ):
            yield one


def _plain(requirement: Requirement) -> str:
    return f"{requirement.name}{requirement.specifier}"


def _installed(requirement: Requirement) -> str | None:
    """Return the version that is installed here, None where none or another one is needed."""
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return None
    return version if requirement.specifier.contains(version, prereleases=True) else None


def _best(
    wheels: Iterable[Wheel],
    wanted: Iterable[Requirement],
    exact: dict[str, str | None],
    target: Target,
    but: Iterable[str] = (),
) -> dict[str, Wheel]:
    """Return the best wheel for each requirement that has one; of the exact versions, where given."""
    from packaging.version import InvalidVersion, Version

    found: dict[str, Wheel] = {}
    wheels, skipped = list(wheels), set(but)
    for one in wanted:
        name = normalized(one.name)
        suitable = []
        for wheel in wheels:
            rank = wheel.rank(target) if wheel.name == name and name not in skipped else None
            try:
                version = Version(wheel.version)
            except InvalidVersion:
                continue
            wrong = exact and exact.get(name) != wheel.version
            if rank is not None and not wrong and one.specifier.contains(version, prereleases=True):
                suitable.append((version, -rank, wheel))
        if suitable:
            found[name] = max(suitable, key=lambda entry: entry[:2])[2]
    return found
