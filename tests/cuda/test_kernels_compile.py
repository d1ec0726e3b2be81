"""Does every kernel compile for every device, without warnings and without spilling registers?

No GPU is needed. Each kernel is compiled for the oldest device. All kernels for all devices would take eight times as
long, so the other devices get

- one kernel of each template, for its warnings, its arguments and PDL;
- the kernels that may spill: on the oldest device they use 70 % of the registers that their blocks leave them, or more.
  Devices differ by some 10 % of these. Not those that differ from another one only in a type (f16 for bf16), the group
  of the weights (32 by default), the head size (both published models have 128) or the number of experts (OLMoE has
  64).

With EDGELM_ALL_KERNELS=1 every device gets all kernels. (An export compiles its kernels itself and refuses one that
spills.)
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
OLDEST, *LATER = TARGETS
ALL = bool(os.environ.get("EDGELM_ALL_KERNELS"))
MAY_SPILL = 0.7


def has_twin(name: str, names: Sequence[str]) -> bool:
    """Whether the same kernel exists with bf16 in place of f16, for groups of 32, heads of 128, or 64 experts."""
    twin = re.sub("_g(64|128)_", "_g32_", re.sub("(?<!b)f16", "bf16", name))
    twin = re.sub("_e(32|128|256)$", "_e64", re.sub("_s(32|64)$", "_s128", twin))
    return twin != name and twin in names


def template(name: str) -> str:
    """The function template that a kernel instantiates."""
    match = re.search(r"(\w+)(<.*>)?\)+$", sources.kernels()[name].line)
    assert match is not None
    return match[1]


def register_limit(name: str) -> int:
    """The registers that a thread may have, so that the promised number of blocks fits on a multiprocessor."""
    match = re.match(r"EDGELM_KERNEL\(\w+, \w+, (\d+), (\d+), ", sources.kernels()[name].line)
    assert match is not None
    return min(255, 65536 // (int(match[1]) * int(match[2])) // 8 * 8)


def for_later_devices(oldest: nvrtc.Compiled) -> list[str]:
    """The kernels to compile for the other devices, given the registers of all kernels of a header on the oldest."""
    used = oldest.resources
    originals = [name for name in used if not has_twin(name, list(used))]
    first = {template(name): name for name in reversed(originals)}
    near = {name for name in originals if used[name].registers >= MAY_SPILL * register_limit(name)}
    return [name for name in used if ALL or name in near or name in first.values()]


HEADERS = sorted({kernel.header for kernel in sources.kernels().values()})


@pytest.fixture(scope="module", params=HEADERS, ids=lambda header: Path(header).stem)
def compiled(request: pytest.FixtureRequest) -> dict[str, nvrtc.Compiled]:
    """One header's kernels for every target."""
    seconds = {}

    def one(target: str, names: Sequence[str]) -> nvrtc.Compiled:
        start = time.thread_time()
        result = nvrtc.compile_kernels(*sources.translation_unit(names), target, names)
        seconds[target] = f"{target} {len(names)} in {time.thread_time() - start:.1f} s"
        return result

    every = [name for name, kernel in sources.kernels().items() if kernel.header == request.param]
    oldest = one(OLDEST, every)
    names = for_later_devices(oldest)
    with ThreadPoolExecutor(allowed_cores()) as pool:  # NVRTC's threads do not wait for each other
        later = pool.map(lambda target: one(target, names), LATER)
        done = {OLDEST: oldest, **dict(zip(LATER, later, strict=True))}
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
    sizes = compiled[OLDEST].argument_bytes
    assert all(sizes.values())
    for target in TARGETS:
        assert compiled[target].argument_bytes.items() <= sizes.items(), target
        assert not any(one.shared_bytes for one in compiled[target].resources.values())


def test_every_template_is_compiled_for_every_device(compiled):
    templates = {template(name) for name in compiled[OLDEST].resources}
    for target in TARGETS:
        assert {template(name) for name in compiled[target].argument_bytes} == templates, target


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
