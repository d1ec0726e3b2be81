"""How many weights per second does the quantisation kernel process? Prints a table, and one JSON line last.

    python tests/bench/quantize_speed.py

Checks the result of each instruction set against numpy, then times it on one thread. CPU time is used, so that other
work on the machine matters little. Prints median and spread of repeats on a bfloat16 matrix of an OLMoE expert's size.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

import numpy as np

from edgelm import devices
from edgelm.quant import native, parse_scheme, primitives

SCHEMES = ("int3-g32-sym", "int4-g32-sym", "int4-g64-asym", "int8-g128-sym", "int8-row-sym")
SHAPE = (1024, 2048)
REPEATS = 15


def speed(work: Callable[[], object], repeats: int) -> tuple[float, float, float]:
    """Return millions of weights per second: median, minimum, maximum."""
    found = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        found.append(SHAPE[0] * SHAPE[1] / (time.process_time() - start) / 1e6)
    return statistics.median(found), min(found), max(found)


def main() -> None:
    """Check and time every scheme on every available instruction set."""
    values = (0.02 * np.random.default_rng(0).standard_normal(SHAPE)).astype(np.float32)
    bf16 = (values.view(np.uint32) >> 16).astype(np.uint16)
    device = devices.describe()
    print(f"{device.cpu}, one thread, million weights per second: median (lowest .. highest) of {REPEATS}")
    records = []
    for name in SCHEMES:
        scheme = parse_scheme(name)
        reference = primitives.quantize(bf16, scheme)
        for isa in (*native.isas()[1:], "numpy"):
            if isa == "numpy":
                quantize = speed(lambda scheme=scheme: primitives.quantize(bf16, scheme), 3)
                dequantize = speed(lambda reference=reference: primitives.dequantize(reference), 3)
            else:
                found = native.quantize(bf16, scheme, threads=1, isa=isa)
                assert np.array_equal(found.codes, reference.codes), f"{name} on {isa} differs from numpy"
                assert np.array_equal(found.scales, reference.scales), f"{name} on {isa} differs from numpy"
                repeats = 3 if isa == "scalar" else REPEATS
                quantize = speed(lambda s=scheme, i=isa: native.quantize(bf16, s, threads=1, isa=i), repeats)
                dequantize = speed(lambda r=reference, i=isa: native.dequantize(r, threads=1, isa=i), repeats)
            columns = [f"{median:6.0f} ({low:.0f} .. {high:.0f})" for median, low, high in (quantize, dequantize)]
            print(f"{name:16}{isa:10}quantise {columns[0]:26} dequantise {columns[1]}")
            records.append({"scheme": name, "isa": isa, "quantize": quantize[0], "dequantize": dequantize[0]})
    print(json.dumps({"cpu": device.cpu, "million_weights_per_second": records}))


if __name__ == "__main__":
    main()
