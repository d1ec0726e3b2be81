"""What a kit holds beside the bundle: the parts for Python, or those for C."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from edgelm.bundle import Bundle
from edgelm.kit.entries import Entry
from edgelm.system.platforms import Platform
from edgelm.version import __version__


@dataclass(frozen=True)
class Parts:
    """Collected parts.

    Attributes:
        entries: their files.
        packages: names of the wheels or archives.
        check: what a person types to check the machine.
        pythons: for each version of Python the names of its wheels in the kit, and the glibc that they need.
        c: whether they are for C.
    """

    entries: Sequence[Entry]
    packages: Sequence[str]
    check: str
    pythons: dict[str, dict[str, Any]]
    c: bool = False

    def kit_json(self, bundle: Bundle, platform: Platform) -> str:
        """Return the contents of kit.json, which the check on the device reads."""
        manifest = bundle.manifest
        return json.dumps(
            {
                "format": "edgelm-kit",
                "format_version": 1,
                "edgelm": __version__,
                "platform": platform.name,
                "c": self.c,
                "model": manifest.model.name,
                "recipe": manifest.recipe.name,
                "target": manifest.target,
                "operators": manifest.ops,
                "pythons": self.pythons,
            },
            indent=1,
        ) + "\n"  # fmt: skip


def template(name: str, **values: str) -> str:
    """Return a file of edgelm/kit/device with each @NAME@ replaced."""
    text = files("edgelm.kit").joinpath("device", name).read_text(encoding="utf-8")
    for key, value in values.items():
        text = text.replace(f"@{key}@", value)
    return text
