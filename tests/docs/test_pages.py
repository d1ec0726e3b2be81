"""Does every example in README and docs run, and does every page hold what a reader needs?"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from examples import ROOT, RUN, ExampleError, blocks, pages, prints, run_page

PAGES = [pytest.param(page, id=str(page.relative_to(ROOT))) for page in pages()]
WITH_EXAMPLES = [page for page in PAGES if any(block.count() for block in blocks(page.values[0]))]
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
WIDE = 120


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pages export before their examples: each command runs once."""
    return tmp_path_factory.mktemp("exports")


@pytest.mark.parametrize("page", WITH_EXAMPLES)
def test_examples_run_and_print_what_the_page_says(page: Path, tmp_path: Path, exports: Path) -> None:
    assert run_page(page, tmp_path, exports)


@pytest.mark.parametrize("page", PAGES)
def test_commands_stand_in_blocks_that_are_run(page: Path) -> None:
    for block in blocks(page):
        assert block.language not in ("sh", "bash", "shell"), f"{page}:{block.line}: write ```console and `$ `"
        if block.language not in RUN and block.file is None:
            wrong = [line for line in block.text.splitlines() if re.match(r"\$? ?(edgelm|make|pip|pytest) ", line)]
            assert not wrong, f"{page}:{block.line}: a command in a block that no test runs: {wrong[0]}"


def anchors(page: Path) -> set[str]:
    """As GitHub and MyST make them of headings."""
    text = re.sub(r"^(```+)[^\n]*\n.*?^\1\s*$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ +(.+?)\s*$", text, flags=re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).lower()).replace(" ", "-")
        for title in titles
    }


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^(```+)[^\n]*\n.*?^\1\s*$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        other = (page.parent / name) if name else page
        assert other.exists(), f"{page}: {target} leads nowhere"
        if anchor and other.suffix == ".md":
            assert anchor in anchors(other), f"{page}: {target}: the page has no such heading: {sorted(anchors(other))}"


@pytest.mark.parametrize("page", PAGES)
def test_lines_are_short_enough_to_read_as_source(page: Path) -> None:
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if not line.lstrip().startswith(("|", "```", "<!--")) and "://" not in line:
            assert len(line) <= WIDE, f"{page}:{number}: {len(line)} characters; at most {WIDE}"


def test_the_picture_is_what_its_script_draws() -> None:
    script = ROOT / "docs" / "figures" / "chain.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES)
def test_no_page_has_a_table_of_contents_of_its_own(page: Path) -> None:
    # The theme shows one beside the page, and an error in place of another.
    assert "```{contents}" not in page.read_text(encoding="utf-8")


def test_an_example_that_prints_something_else_is_noticed() -> None:
    assert prints(["KL 0.0014", "...", "passed"], "KL  0.25\nmore\n\npassed\n") is None
    assert prints(["passed"], "KL 1\npassed") == "passed"
    assert prints(["...", "passed"], "failed") == "passed"
    assert prints(["wrote 3 ..."], "wrote 14 files") is None
    assert prints(["wrote 3 ..."], "read 14 files") == "wrote 3 ..."


def test_a_page_that_is_written_wrongly_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    for text in ("```console\n$ ls\n", "<!-- exit: 1 -->\nwords\n", "<!-- not run -->\n```console\n$ ls\n```\n"):
        page.write_text(text)
        with pytest.raises(ExampleError):
            blocks(page)
    page.write_text("```console\nls\n```\n")
    with pytest.raises(ExampleError, match="starts with"):
        blocks(page)[0].count()
