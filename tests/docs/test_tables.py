"""Are the tables of measured figures those that the script makes of the benchmarks' JSON?"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs" / "performance"))
sys.path.insert(0, str(ROOT / "tests" / "bench"))

import figures  # noqa: E402  found by the lines above
import gpu_memory  # noqa: E402
import tables  # noqa: E402
from figures import DECODE, LLAMA, LLAMA_PLAIN, NATIVE  # noqa: E402


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_a_page_has_the_figures_of_the_json(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert tables.rewrite(text, ROOT / "docs" / "performance") == text, "run python docs/performance/tables.py --write"


def test_the_memory_of_models_on_a_jetson_is_what_their_programs_need() -> None:
    lines = (ROOT / "docs" / "gpu" / "jetson.md").read_text(encoding="utf-8").splitlines()
    cells = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in lines if " | " in line}
    for name, numbers in gpu_memory.rows(4096).items():
        # Scratch memory changes with the kernels, by some MiB.
        assert [int(cell.replace(",", "")) for cell in cells[name]] == pytest.approx(numbers, rel=0.02), name


def run(folder: Path, **more: object) -> tables.Peers:
    found = figures.Measurements()
    found.add("olmoe int4", "llama.cpp", DECODE, NATIVE, [30.0, 45.0, 40.0])
    found.add("olmoe int4", "llama.cpp", DECODE, LLAMA, [20.0, 36.0, 40.0])
    found.add("olmoe int4", "llama.cpp", DECODE, LLAMA_PLAIN, [10.0, 18.0, 20.0])
    found.add("olmoe int4", "alone", figures.RESIDENT, NATIVE, [1e9, 2e9, 3e9])
    found.add("olmoe int4", "alone", figures.RESIDENT, LLAMA, [4e9])
    document = {"measurements": [item.as_dict() for item in found.all], **more}
    (folder / "peers.json").write_text(json.dumps(document))
    return tables.Peers(folder / "peers.json")


def test_ratios_are_medians_of_repetitions_and_llama_cpp_has_its_faster_setting(tmp_path: Path) -> None:
    lines = tables.TABLES["decode"].lines(run(tmp_path))
    assert lines[0] == "| tokens/s | OLMoE-1B-7B int4 |"
    assert lines[2:] == ["| EdgeLM | 40.0 |", "| llama.cpp | 36.0 |", "| EdgeLM / llama.cpp | **1.25** |"]


def test_memory_is_compared_by_medians(tmp_path: Path) -> None:
    lines = tables.TABLES["memory"].lines(run(tmp_path))
    assert lines[2:] == ["| EdgeLM | 2.00 |", "| llama.cpp | 4.00 |", "| EdgeLM / llama.cpp | **0.50** |"]


def test_a_recorded_ratio_counts_where_the_repetitions_were_not_kept(tmp_path: Path) -> None:
    record = {"column": "olmoe int4", "row": DECODE, "ours": NATIVE, "theirs": "llama.cpp", "value": 1.11}
    assert "| EdgeLM / llama.cpp | **1.11** |" in tables.TABLES["decode"].lines(run(tmp_path, ratios=[record]))
    assert "| EdgeLM / llama.cpp | **1.11** |" in tables.TABLES["decode"].lines(run(tmp_path, ratios=[]))


def test_a_page_keeps_what_is_not_a_table(tmp_path: Path) -> None:
    run(tmp_path)
    text = "before\n\n<!-- table: headline -->\nold\n<!-- /table -->\nafter\n"
    assert tables.rewrite(text, tmp_path) == text.replace("old\n", "\n".join(tables.table("headline", tmp_path)) + "\n")
    with pytest.raises(ValueError, match="no table 'fast'"):
        tables.rewrite(text.replace("headline", "fast"), tmp_path)
