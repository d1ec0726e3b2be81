"""Write docs/reference/c.md from runtimes/csrc/capi/edgelm.h.

    python docs/_ext/c_reference.py --write

tests/docs/test_c_page.py checks that the page is what the header gives.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
HEADER = ROOT / "runtimes" / "csrc" / "capi" / "edgelm.h"
PAGE = ROOT / "docs" / "reference" / "c.md"

_INTRO = """# C and C++ API

All of `edgelm.h`, the interface of `libedgelm`. [Embed a bundle in C or C++](../guides/c.md) shows how it is used.
`edgelm.hpp` has the same for C++17, with the same names in namespace `edgelm`: `edgelm::Model`, `Generation`,
`Detokenizer`, options with std types, and the exception `edgelm::Error`.

<!-- written by docs/_ext/c_reference.py --write -->
"""


def _marked(found: re.Match[str]) -> str:
    return found[1] or f"`{found[2]}`"


def _code(declarations: str) -> str:
    """Declarations without EDGELM_API, their further lines as far to the left."""
    lines, shift = [], False
    for line in declarations.strip().splitlines():
        begins = line.startswith("EDGELM_API ")
        shift = begins or (shift and line.startswith(" "))
        lines.append(line.removeprefix("EDGELM_API ") if begins else line.removeprefix(" " * 11) if shift else line)
    return "\n".join(lines)


def _prose(comment: str) -> str:
    """The text of a comment, as paragraphs of the page."""
    inner = re.sub(r"^\s*\* ?", "", comment.strip().removeprefix("/*").removesuffix("*/"), flags=re.MULTILINE)
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", inner)]
    marked = [re.sub(r"(`[^`]*`)|\b(edgelm_\w+\*?|EDGELM_\w+)", _marked, part) for part in paragraphs if part]
    return "\n\n".join(textwrap.fill(part, 120, break_long_words=False, break_on_hyphens=False) for part in marked)


def _groups(body: str) -> Iterator[tuple[str, str]]:
    """Comment and declarations of each group: what stands between empty lines, or from one comment on to the next."""
    for block in re.split(r"\n\s*\n", body):
        comment, code = "", ""
        for match in re.finditer(r"(?m)^/\*.*?\*/\n?|^[^\n]*\n?", block, re.DOTALL):
            text = match[0]
            if text.startswith("/*"):
                if code.strip():
                    yield comment, code
                comment, code = text, ""
            else:
                code += text
        if code.strip():
            yield comment, code


def page() -> str:
    """The page's text."""
    header = HEADER.read_text(encoding="utf-8")
    top, rest = header.split("#ifndef EDGELM_H_", 1)
    body = rest.split('extern "C" {\n#endif', 1)[1].split("#ifdef __cplusplus\n}", 1)[0]
    parts = [_INTRO, _prose(top)]
    titles = re.split(r"/\* -{4} ([\w ]+?) -+ \*/", body)
    for title, text in zip(["types and codes", *titles[1::2]], titles[::2], strict=True):
        parts.append(f"## {title[0].upper()}{title[1:]}")
        for comment, code in _groups(text):
            if comment:
                parts.append(_prose(comment))
            parts.append(f"```c\n{_code(code)}\n```")
    return "\n\n".join(part.strip() for part in parts) + "\n"


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        PAGE.write_text(page(), encoding="utf-8", newline="\n")
    else:
        sys.stdout.write(page())
