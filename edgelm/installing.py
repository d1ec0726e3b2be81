"""The pip command that installs what is missing.

EdgeLM is not on a package index, so the command names the source of this installation: the checkout or the wheel that
pip recorded (PEP 610). Where neither exists any more, it names the packages of the extra.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

NAME = "edgelm"
# Extras whose packages have no wheels for Python 3.10; their markers in pyproject.toml say the same.
_NEWER_PYTHON = {"cpu": (3, 11), "cuda": (3, 11), "dev": (3, 11)}


def install_hint(*extras: str) -> str:
    """Return the pip command that adds these extras to this installation; without any, one that reinstalls EdgeLM.

    If this Python is too old for an extra, the hint asks for a newer one first.
    """
    least = max((_NEWER_PYTHON.get(extra, (3, 0)) for extra in extras), default=(3, 0))
    command = _command(extras)
    if sys.version_info >= least:
        return command
    here, newer = ("{}.{}".format(*version[:2]) for version in (sys.version_info, least))
    return f"this is Python {here}; with Python {newer} or newer: {command}"


def _command(extras: tuple[str, ...]) -> str:
    wanted = f"[{','.join(extras)}]" if extras else ""
    again = "" if extras else "--force-reinstall --no-deps "
    origin, editable = _origin()
    if origin is not None:
        return f"pip install {again}{'-e ' if editable else ''}'{origin}{wanted}'"
    packages = [package for extra in extras for package in _packages(extra)]
    if packages:
        return "pip install " + " ".join(f"'{package}'" for package in dict.fromkeys(packages))
    return f"pip install {again}'.{wanted}' in a checkout of EdgeLM"


def _origin() -> tuple[Path | None, bool]:
    """Return the folder or wheel that EdgeLM was installed from, if it still exists; and whether it is editable."""
    import importlib.metadata  # takes 15 ms, so it is imported only when something is missing

    try:
        recorded = json.loads(importlib.metadata.distribution(NAME).read_text("direct_url.json") or "{}")
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return None, False
    url = urlsplit(recorded.get("url", ""))
    path = Path(unquote(url.path))
    if url.scheme != "file" or not ((path / "pyproject.toml").is_file() or (path.suffix == ".whl" and path.is_file())):
        return None, False
    return path, bool(recorded.get("dir_info", {}).get("editable"))


def _packages(extra: str) -> list[str]:
    """Return the requirements of an extra by the installed metadata, with those of the extras that it includes."""
    import importlib.metadata

    try:
        declared = importlib.metadata.requires(NAME) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    found: list[str] = []
    for line in declared:
        requirement, _, marker = line.partition(";")
        if not re.search(rf"""extra\s*==\s*['"]{re.escape(extra)}['"]""", marker):
            continue
        inner = re.fullmatch(rf"{NAME}\[([\w.,\s-]+)\]", requirement.strip())
        found += (
            [p for name in inner[1].split(",") for p in _packages(name.strip())] if inner else [requirement.strip()]
        )
    return found
