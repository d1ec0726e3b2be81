"""Does every kernel compile for every device, without warnings and without spilling registers?

No GPU is needed. All kernels for all devices take twelve minutes of CPU time. Most of them differ from another one in a
type (f16 for bf16), the group of the weights (32 by default), the head size (both published models have 128) or the
number of experts (OLMoE has 64). These are compiled for the oldest device only, unless EDGELM_ALL_KERNELS is set. (An
export compiles its kernels itself and refuses one that spills.)
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from edgelm.devices import allowed_cores
from edgelm.runtimes.cuda.kernels import nvrtc, sources

TARGETS = (*(f"sm_{sm}" for sm in nvrtc.SMS), nvrtc.PTX_TARGET)
FULL = TARGETS if os.environ.get("EDGELM_ALL_KERNELS") else ("sm_80",)


def has_twin(name: str, names: Sequence[str]) -> bool:
    """Whether the same kernel exists with bf16 in place of f16, for groups of 32, heads of 128, or 64 experts."""
    twin = re.sub("_g(64|128)_", "_g32_", re.sub("(?<!b)f16", "bf16", name))
    twin = re.sub("_e(32|128|256)$", "_e64", re.sub("_s(32|64)$", "_s128", twin))
    return twin != name and twin in names


HEADERS = sorted({kernel.header for kernel in sources.kernels().values()})


@pytest.fixture(scope="module", params=HEADERS, ids=lambda header: Path(header).stem)
def compiled(request: pytest.FixtureRequest) -> dict[str, nvrtc.Compiled]:
    """One header's kernels for every target."""
    every = [name for name, kernel in sources.kernels().items() if kernel.header == request.param]
    seconds = {}

    def one(target: str) -> nvrtc.Compiled:
        names = every if target in FULL else [name for name in every if not has_twin(name, every)]
        start = time.thread_time()
        result = nvrtc.compile_kernels(*sources.translation_unit(names), target, names)
        seconds[target] = f"{target} {len(names)} in {time.thread_time() - start:.1f} s"
        return result

    with ThreadPoolExecutor(allowed_cores()) as pool:  # NVRTC's threads do not wait for each other
        done = dict(zip(TARGETS, pool.map(one, TARGETS), strict=True))
    print(f"\n{request.param}:", ", ".join(seconds[target] for target in TARGETS))  # pytest -s shows it
    return done


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles_without_warnings(compiled, target):
    assert not compiled[target].log, compiled[target].log[:2000]


@pytest.mark.parametrize("target", TARGETS[:-1])
def test_no_kernel_spills(compiled, target):
    used = compiled[target].resources
    assert used
    spilled = {name: (one.local_bytes, one.registers) for name, one in used.items() if one.local_bytes}
    assert not spilled, f"(bytes of stack, registers) on {target}: {spilled}"


@pytest.mark.parametrize("target", [target for target in TARGETS if target in ("sm_90", "sm_100", "sm_120")])
def test_every_kernel_waits_for_the_previous_one_where_pdl_is_possible(compiled, target):
    lacking = set(compiled[target].argument_bytes) - compiled[target].pdl
    assert not lacking, "wait_for_previous_kernel() is missing, so these do not support PDL"


def test_arguments_have_the_same_size_on_every_device_and_shared_memory_is_dynamic(compiled):
    sizes = compiled[FULL[0]].argument_bytes
    assert all(sizes.values())
    for target in TARGETS:
        assert compiled[target].argument_bytes.items() <= sizes.items(), target
        assert not any(one.shared_bytes for one in compiled[target].resources.values())


def test_every_header_of_the_sources_is_one_that_some_kernel_needs():
    source, headers = sources.translation_unit(list(sources.kernels()))
    reached, left = set(), [line.split('"')[1] for line in source.splitlines() if line.startswith("#include")]
    while left:
        name = left.pop()
        if name not in reached:
            reached.add(name)
            text = headers.get(name, "")
            left += [line.split('"')[1] for line in text.splitlines() if line.startswith('#include "')]
    assert set(headers) == {name for name in reached if Path(name).suffix == ".cuh"}
