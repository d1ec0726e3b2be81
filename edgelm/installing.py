"""How to install what is missing, in a command that works here.

EdgeLM is not registered on a package index, so a hint names what this installation came from: the checkout or the wheel
file that pip recorded (PEP 610). Where neither is left, it names the packages themselves.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

NAME = "edgelm"


def install_hint(*extras: str) -> str:
    """The command that adds these extras of EdgeLM to this installation; without any, one that installs it again."""
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
    """The folder or wheel file that EdgeLM was installed from, if it is still there; and whether it is editable."""
    import importlib.metadata  # 15 ms that no command spends unless something is missing

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
    """The requirements that the installed metadata gives for one extra, those of the extras that it names included."""
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
