"""Does every kernel compile for every device, without warnings, and does none of them spill registers?

Every name that a launch module knows is compiled by NVRTC for all devices and as PTX; no GPU is needed.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from edgelm.devices import allowed_cores
from edgelm.runtimes.cuda import nvrtc, sources

TARGETS = (*(f"sm_{sm}" for sm in nvrtc.SMS), nvrtc.PTX_TARGET)


@pytest.fixture(scope="module", params=sources.modules(), ids=lambda module: module.__name__.rpartition(".")[2])
def compiled(request: pytest.FixtureRequest) -> dict[str, nvrtc.Compiled]:
    """One module's kernels for every target."""
    names = request.param.all_kernels()
    source, headers = sources.translation_unit(names)
    seconds = {}

    def one(target: str) -> nvrtc.Compiled:
        start = time.perf_counter()
        result = nvrtc.compile_kernels(source, headers, target, names)
        seconds[target] = time.perf_counter() - start
        return result

    with ThreadPoolExecutor(allowed_cores()) as pool:  # NVRTC's threads do not wait for each other
        done = dict(zip(TARGETS, pool.map(one, TARGETS), strict=True))
    # pytest -s shows what takes long.
    print(f"\n{request.param.HEADER}: {len(names)} kernels,", ", ".join(f"{t} {s:.1f} s" for t, s in seconds.items()))
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


def test_arguments_have_the_same_size_on_every_device_and_shared_memory_is_dynamic(compiled):
    sizes = compiled[TARGETS[0]].argument_bytes
    assert all(sizes.values())
    for target in TARGETS:
        assert compiled[target].argument_bytes == sizes, target
        assert not any(one.shared_bytes for one in compiled[target].resources.values())


def test_every_kernel_has_a_name_of_its_own():
    names = sources.all_kernels()
    assert len(set(names)) == len(names) > 0


def test_every_header_of_the_sources_is_one_that_some_kernel_needs():
    source, headers = sources.translation_unit(sources.all_kernels())
    reached, left = set(), [line.split('"')[1] for line in source.splitlines() if line.startswith("#include")]
    while left:
        name = left.pop()
        if name not in reached:
            reached.add(name)
            text = headers.get(name, "")
            left += [line.split('"')[1] for line in text.splitlines() if line.startswith('#include "')]
    assert set(headers) == {name for name in reached if Path(name).suffix == ".cuh"}
