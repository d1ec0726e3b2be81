"""Are the launches of a decode step, and the instructions that its kernels execute, those of the committed table?

A change of a kernel or of the planning changes them. After it, run `python tests/cuda/cost_model.py --write --device
H200` and look at the difference: docs/gpu/decode_cost.json holds a line for each launch. Times are never compared.
"""

from __future__ import annotations

import json
import os

import cost_counts
import cost_model
import pytest
import sass
from cost_counts import KINDS, MODELS, Counts
from cost_time import GPUS, GpuModel, launch_time, step_time

DOCUMENT = json.loads(cost_model.JSON.read_text(encoding="utf-8"))
SM, MULTIPROCESSORS = 90, 132
# Others take twice as long, and have the same code but for conversions.
COUNTED = KINDS if os.environ.get("EDGELM_ALL_KERNELS") else ("bf16", "int4")

needs_nvdisasm = pytest.mark.skipif(
    sass.nvdisasm() is None and os.environ.get("CI") != "true", reason="nvdisasm is missing: pip install '.[dev]'"
)


@needs_nvdisasm
@pytest.mark.parametrize("kind", COUNTED)
@pytest.mark.parametrize("model", MODELS)
def test_launches_and_instructions_are_those_of_the_table(model: str, kind: str) -> None:
    # constraints.txt pins the version, so another one in CI is a mistake.
    if cost_model.nvrtc_version() != DOCUMENT["nvrtc"] and os.environ.get("CI") != "true":
        pytest.skip(f"counted with NVRTC {DOCUMENT['nvrtc']}, this one is {cost_model.nvrtc_version()}")
    found = cost_model.counted(model, kind, SM, MULTIPROCESSORS)
    held = DOCUMENT["now"][cost_model.device_key(SM, MULTIPROCESSORS)][model][kind]
    assert found == held, "run python tests/cuda/cost_model.py --write --device H200, and look at the difference"


@needs_nvdisasm
@pytest.mark.parametrize(("model", "part"), [("fox-1-1.6b", "o"), ("olmoe-1b-7b", "down")])
def test_executed_blocks_read_each_of_their_tiles_once(model: str, part: str) -> None:
    """The experts' down matmul reads the matrices that the executed routing chose."""
    step = cost_counts.plan(model, "int4")
    kernel = "moe_down" if part == "down" else "linear_skinny"
    found = cost_counts.counts_of(step, SM, kernel=kernel, blocks=1)
    one = next(each for each in found if each.counts.part == part)
    stream = next(each for each in step.streams if each.name == part)
    tiles = [
        load.first
        for trace in one.traces
        for load in trace.loads
        if stream.start <= load.first < stream.end and load.nbytes == 512
    ]
    assert len(tiles) == len(set(tiles)) == stream.nbytes_of_codes // 512 // one.counts.blocks


@pytest.mark.parametrize("model", MODELS)
def test_memory_is_that_of_the_table(model: str) -> None:
    assert {kind: cost_counts.memory(model, kind) for kind in KINDS} == DOCUMENT["memory"][model]


def test_fox_in_bf16_needs_no_more_memory_than_its_authors_report() -> None:
    assert sum(DOCUMENT["memory"]["fox-1-1.6b"]["bf16"].values()) <= 3703 << 20


def test_the_page_is_what_the_table_says() -> None:
    text = cost_model.PAGE.read_text(encoding="utf-8")
    assert cost_model.rewritten(text, DOCUMENT) == text, "run python tests/cuda/cost_model.py --write"


def counts(**changes: int) -> Counts:
    """Return the counts of a launch of 100 blocks on a device of 100 multiprocessors."""
    values = {
        "kernel": "some", "part": "o", "times": 1, "blocks": 100, "warps": 8, "before": 400, "divisions": 9, "tiles": 8,
        "per_tile": 100.0, "rest": 200, "warp": 1400, "first": 1500, "block": 11_200, "largest": 12_000, "nbytes": 0,
    }  # fmt: skip
    return Counts(**(values | changes))


GPU = GpuModel("some", 90, 100, 1.0, 1000, 80, "")


def test_a_launch_is_bound_by_memory_or_by_instructions() -> None:
    few, many = launch_time(counts(), GPU), launch_time(counts(nbytes=100_000_000), GPU)
    assert few.total == pytest.approx(few.fixed + few.issue)
    assert many.total == pytest.approx(many.fixed + many.memory)
    assert many.memory > many.issue == few.issue


def test_fewer_instructions_before_the_first_load_shorten_a_launch_that_waits_for_memory() -> None:
    long, short = (launch_time(counts(before=before, nbytes=100_000_000), GPU) for before in (400, 100))
    assert long.total - short.total == pytest.approx(300 * 4 / 1e9)
    assert long.early == short.early, "an early launch hides them"


def test_twice_as_many_blocks_take_twice_the_issue_time() -> None:
    once, twice = (launch_time(counts(before=0, blocks=blocks, first=0, largest=0), GPU) for blocks in (100, 200))
    assert twice.issue == pytest.approx(2 * once.issue)


def test_a_step_is_the_sum_of_its_launches_and_never_beats_memory() -> None:
    for model in MODELS:
        for kind in KINDS:
            held = DOCUMENT["now"][cost_model.device_key(SM, MULTIPROCESSORS)][model][kind]
            step = [Counts(**one) for one in held]
            for gpu in GPUS:
                time = step_time(step, gpu)
                assert time.limit < time.early < time.total
                assert time.total == pytest.approx(sum(one.times * launch_time(one, gpu).total for one in step))
