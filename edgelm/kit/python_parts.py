"""Parts of a kit for Python: our wheel, the wheels that it needs for each version of Python, and the check."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from edgelm.bundle import Bundle, sha256_of, version_numbers
from edgelm.errors import EdgeLMError
from edgelm.kit.entries import of_bytes, of_file
from edgelm.kit.parts import Parts, template
from edgelm.kit.wheels import Target, Wheel, WheelSource, check_python, is_pure, need_packaging, our_wheel
from edgelm.progress import Progress
from edgelm.system.platforms import Platform
from edgelm.version import __version__

PYTHONS = {
    ("linux-aarch64", "cpu"): (11, 13),  # Raspberry Pi OS Bookworm and Trixie
    ("linux-aarch64", "tensorrt"): (10, 12),  # JetPack 6 and 7
    ("linux-x86_64", "cpu"): (11, 12, 13),  # Debian 12, Ubuntu 24.04, Debian 13
}
"""Minor versions of Python 3 that the systems of a platform have, by target."""
OTHERWISE = (11, 12, 13)


def minors(bundle: Bundle, platform: Platform, given: Sequence[str]) -> tuple[int, ...]:
    """Return the minor versions of Python 3 to take packages for.

    Raises:
        EdgeLMError: one of those given is none, or too old for the bundle.
    """
    target = bundle.manifest.target
    if not given:
        return PYTHONS.get((platform.name, target), OTHERWISE)
    found = []
    for text in given:
        match = re.fullmatch(r"3\.(\d{1,2})", text.strip())
        if match is None:
            raise EdgeLMError(f"{text!r:.40} is no version of Python: write for example 3.11,3.13")
        found.append(int(match[1]))
    least = 10 if target == "tensorrt" else platform.python
    if min(found) < least:
        raise EdgeLMError(f"the packages of the target {target} need Python 3.{least} or newer, not 3.{min(found)}")
    return tuple(sorted(set(found)))


def collect(
    bundle: Bundle,
    platform: Platform,
    dist: Sequence[Path],
    wheels: Path | None,
    pythons: Sequence[int],
    progress: Progress,
) -> Parts:
    """Return the parts of a kit for Python.

    Args:
        bundle: the bundle that the kit is for.
        platform: the platform.
        dist: folders in which our wheel may be.
        wheels: the only folder of other wheels; None for the cache and pip.
        pythons: minor versions of Python 3.
        progress: where to report progress.

    Raises:
        EdgeLMError: a wheel is missing or too old for the bundle.
    """
    need_packaging()
    ours = our_wheel(dist, __version__, platform)
    if ours is None:
        raise EdgeLMError(
            f"there is no wheel of EdgeLM {__version__} for {platform.name} in {' or '.join(map(str, dist))}: "
            f"make wheels PLATFORMS={platform.name} in a checkout makes it; --dist names another folder"
        )
    manifest = bundle.manifest
    portable = manifest.target == "cpu" and manifest.ops == "portable"
    if not portable and (is_pure(ours) or not ours.holds("edgelm/runtimes/_edgelm_ops")):
        raise EdgeLMError(
            f"{ours.path} has no compiled operators, which {bundle.path} needs: make wheels PLATFORMS={platform.name} "
            "in a checkout makes a wheel that has them; or export the bundle with --ops portable"
        )
    extra = {"cpu": "cpu", "cuda": "cuda"}.get(manifest.target)
    source, chosen = WheelSource(wheels, progress), {}
    for minor in pythons:
        target = Target(platform, minor)
        check_python(ours, target)
        chosen[target.python] = source.closure(ours, extra, target)
        _check_versions(bundle, chosen[target.python])
    unique = {wheel.path.name: wheel for several in chosen.values() for wheel in several}
    entries = [of_file(f"wheels/{name}", wheel.path, sha256_of(wheel.path)) for name, wheel in sorted(unique.items())]
    names = " ".join(f"python{python}" for python in reversed(chosen))
    entries.append(of_bytes("check.py", template("check.py"), executable=True))
    if platform.name.startswith("windows-"):
        script = template("check.bat", PYTHONS=" ".join(chosen)).replace("\n", "\r\n")
        entries.append(of_bytes("check.bat", script))
    else:
        script = template("check.sh", PYTHONS=" ".join(chosen), NAMES=names)
        entries.append(of_bytes("check.sh", script, executable=True))
    return Parts(
        entries,
        sorted(unique),
        "check.bat" if platform.name.startswith("windows-") else "sh check.sh",
        {
            python: {"wheels": [f"wheels/{wheel.path.name}" for wheel in several], "glibc": _glibc(several)}
            for python, several in chosen.items()
        },
    )


def _glibc(wheels: Sequence[Wheel]) -> str | None:
    """Return the glibc that all these wheels load with."""
    newest = max((wheel.glibc for wheel in wheels if wheel.glibc), default=None)
    return None if newest is None else "{}.{}".format(*newest)


def _check_versions(bundle: Bundle, wheels: Sequence[Wheel]) -> None:
    """Check the versions that a bundle asks for."""
    versions = {wheel.name: wheel.version for wheel in wheels}
    for need in bundle.manifest.requires:
        found = versions.get(need.package)
        if found is not None and version_numbers(found) < need.numbers:
            raise EdgeLMError(
                f"{bundle.path} needs {need.package} {need.version} or newer ({need.feature}), and the kit would have "
                f"{found}: install a newer one here, or give its wheel with --wheels"
            )
