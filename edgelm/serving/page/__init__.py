"""The web page of `edgelm serve`: one HTML file, and the headers that say what it may do."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

_FILE = Path(__file__).with_name("index.html")


@lru_cache(maxsize=1)
def load_page() -> tuple[bytes, Mapping[str, str]]:
    """Return the page and the headers of its HTTP answer. The file is read once.

    The Content-Security-Policy allows the page's one script and one style by their hashes, and requests to the server
    that sent it. It has no exceptions: a text that gets into the page as HTML by mistake can run nothing, load nothing
    and send nothing anywhere.

    Raises:
        OSError: the file cannot be read: the installation is damaged.
    """
    page = _FILE.read_bytes()
    policy = {
        "default-src": "'none'",
        "script-src": _hash(page, "script"),
        "style-src": _hash(page, "style"),
        "connect-src": "'self'",
        "img-src": "data:",  # the icon
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    headers = {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "Cache-Control": "no-cache",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    return page, MappingProxyType(headers)


def _hash(page: bytes, tag: str) -> str:
    """Return the source expression of the page's only element `tag`."""
    found = re.findall(rf"^<{tag}>(.*?)^</{tag}>$".encode(), page, re.DOTALL | re.MULTILINE)
    assert len(found) == 1, f"the page has {len(found)} elements {tag}"
    return f"'sha256-{base64.b64encode(hashlib.sha256(found[0]).digest()).decode()}'"
