"""The software bill of materials of a release: CycloneDX 1.6 as JSON.

Written here: the document is a dictionary of a dozen fields, for which cyclonedx-python-lib would bring eight packages.
tests/unit/test_dist.py compares it with the metadata of the installed packages.
"""

from __future__ import annotations

import datetime
import hashlib
import uuid
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LIBRARIES = {
    "libc++": ("Apache-2.0 WITH LLVM-exception", "C++ library, linked into each library that ships"),
    "compiler-rt": (
        "Apache-2.0 WITH LLVM-exception",
        "the compiler's arithmetic, linked into each library that ships",
    ),
}
"""What zig links statically: licence, and what it is."""


def run_time_packages(extra: str = "cpu") -> dict[str, metadata.Distribution]:
    """Return what pip installs here for EXTRA of edgelm, by name: requirements of requirements too.

    Args:
        extra: the extra of what runs a bundle.
    """
    found: dict[str, metadata.Distribution] = {}
    waiting = [(text, extra) for text in metadata.requires("edgelm") or []]
    while waiting:
        text, wanted = waiting.pop()
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": wanted}):
            continue
        name = canonicalize_name(requirement.name)
        if name not in found:
            found[name] = metadata.distribution(name)
            waiting += [(text, "") for text in metadata.requires(name) or []]
    return dict(sorted(found.items()))


def bill(version: str, files: list[Path], epoch: int) -> dict[str, Any]:
    """Return the document.

    Args:
        version: of the release.
        files: what is released; each is named with its SHA-256.
        epoch: time of the release, in seconds since 1970.
    """
    zig = metadata.version("ziglang")
    packages = run_time_packages()
    released = [_file(path) for path in sorted(files)]
    components = [*released, *(_package(one) for one in packages.values())]
    components += [
        {"type": "library", "bom-ref": name, "name": name, "version": f"zig-{zig}", "description": what,
         "licenses": [{"expression": licence}]}
        for name, (licence, what) in LIBRARIES.items()
    ]  # fmt: skip
    time = datetime.datetime.fromtimestamp(epoch, datetime.timezone.utc)
    digest = "".join(one["hashes"][0]["content"] for one in released)
    own = f"pkg:pypi/edgelm@{version}"
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, digest)}",  # of the content: the same each time
        "version": 1,
        "metadata": {
            "timestamp": time.isoformat().replace("+00:00", "Z"),
            "tools": {"components": [{"type": "application", "name": "ziglang", "version": zig},
                                     {"type": "application", "name": "scikit-build-core",
                                      "version": metadata.version("scikit-build-core")}]},
            "component": {"type": "library", "bom-ref": own, "name": "edgelm", "version": version, "purl": own,
                          "licenses": [{"license": {"id": "Apache-2.0"}}]},
        },
        "components": components,
        "dependencies": [{"ref": own, "dependsOn": [one["bom-ref"] for one in components]}],
    }  # fmt: skip


def _file(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"type": "file", "bom-ref": path.name, "name": path.name,
            "hashes": [{"alg": "SHA-256", "content": digest}]}  # fmt: skip


def _package(package: metadata.Distribution) -> dict[str, Any]:
    name = canonicalize_name(package.metadata["Name"])
    purl = f"pkg:pypi/{name}@{package.version}"
    found: dict[str, Any] = {"type": "library", "bom-ref": purl, "name": name, "version": package.version, "purl": purl}
    if expression := package.metadata["License-Expression"]:
        found["licenses"] = [{"expression": expression}]
    return found
