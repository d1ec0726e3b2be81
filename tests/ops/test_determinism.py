"""Are results the same bytes on every instruction set, with any number of threads, and beside other sessions?"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from operator_models import Array, feeds, session
from packed_weights import pack_experts, random_matrix

from edgelm.bundle.kv_cache import KV_TYPES, row_bytes
from edgelm.runtimes.onnxruntime.native_library import describe_cpu

D = 256
KINDS = ["int4", "int8", "int3", "int5", "int6", "split", "fp8", "bfloat16", "float16", "float32"]


def cases() -> dict[str, tuple[str, dict[str, Array], dict[str, object]]]:
    """Return a call per operator and variant, large enough for several tasks."""
    rng = np.random.default_rng(11)
    norm = rng.uniform(0.5, 2, D).astype(np.float32)
    found: dict[str, tuple[str, dict[str, Array], dict[str, object]]] = {}
    for kind in KINDS:
        weights = random_matrix(rng, kind, 520, D, group=64, swiglu=kind == "int8").blob
        for rows in (1, 3, 150):
            x = rng.standard_normal((rows, D)).astype(np.float32)
            for activations in ("int8", "float32"):
                inputs = {"x": x, "weights": weights, "norm": norm}
                found[f"linear {kind} {rows} {activations}"] = ("QuantLinear", inputs, {"activations": activations})
        ids = rng.integers(0, 520, (1, 30))
        if kind != "int8":
            found[f"embedding {kind}"] = ("QuantEmbedding", {"ids": ids, "table": weights}, {})
    weights = random_matrix(rng, "split", 9000, 64, group=64).blob
    x = rng.standard_normal((1, 64)).astype(np.float32)
    found["rescored"] = ("QuantLinear", {"x": x, "weights": weights}, {"refine": 20})
    for rows in (1, 150):
        x, residual = (rng.standard_normal((rows, 250)).astype(np.float32) for _ in range(2))
        inputs = {"x": x, "weight": norm[:250], "residual": residual}
        found[f"norm {rows}"] = ("RMSNorm", inputs, {})
    experts = [
        (random_matrix(rng, kind, 2 * 160, D, group=64, swiglu=True), random_matrix(rng, kind, D, 160, group=32))
        for kind in KINDS
    ]
    for tokens in (1, 5, 90):
        x = rng.standard_normal((1, tokens, D)).astype(np.float32)
        layer = {
            "x": x,
            "router": random_matrix(rng, "float32", len(KINDS), D).blob,
            "experts": pack_experts(experts),
            "norm": norm,
            "residual": x,
        }
        for activations in ("int8", "float32"):
            found[f"moe {tokens} {activations}"] = ("SparseMoE", layer, {"k": 3, "activations": activations})
    positions = np.arange(900)[:, None] / 10000 ** (np.arange(16) / 16)
    for kv in KV_TYPES:
        for past, tokens in ((700, 2), (0, 80)):
            cache = np.zeros((2, 2, 800, row_bytes(kv, 32)), np.uint8)
            attention = {
                "qkv": rng.standard_normal((2, tokens, 8 * 32)).astype(np.float32),
                "past_key": cache,
                "past_value": cache,
                "past_lengths": np.full(2, past),
                "cos": np.cos(positions).astype(np.float32),
                "sin": np.sin(positions).astype(np.float32),
            }
            found[f"attention {kv} {tokens}"] = ("GroupQueryAttention", attention, {"num_heads": 4, "kv_num_heads": 2})
    return found


def digest(threads: int) -> dict[str, str]:
    """Return a checksum of the results of every case."""
    found = {}
    for name, (op, inputs, attributes) in cases().items():
        s = session(op, inputs, threads=threads, **attributes)
        hashed = hashlib.sha256()
        for output in s.run(None, feeds(s, inputs)):
            hashed.update(output.tobytes())
        found[name] = hashed.hexdigest()
    return found


@pytest.fixture(scope="module")
def one_thread() -> dict[str, str]:
    return digest(1)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_do_not_change_a_bit(threads: int, one_thread: dict[str, str]) -> None:
    assert digest(threads) == one_thread


def in_another_process(code: str, isa: str) -> subprocess.CompletedProcess[str]:
    """Run `code` with an instruction set, in another process: the library chooses its kernels once."""
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-P", "-c", code],  # -P: without the current folder, which in a checkout has only edgelm/
        env=os.environ | {"EDGELM_ISA": isa, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.parametrize("isa", [isa.name for isa in describe_cpu().instruction_sets if isa.available])
def test_instruction_sets_do_not_change_a_bit(isa: str, one_thread: dict[str, str]) -> None:
    code = "import test_determinism as t; print('\\n'.join(f'{k}: {v}' for k, v in t.digest(1).items()))"
    done = in_another_process(code, isa)
    assert done.returncode == 0, done.stderr
    assert dict(line.split(": ") for line in done.stdout.splitlines()) == one_thread


def test_an_unknown_instruction_set_is_refused() -> None:
    done = in_another_process("import operator_models as m; m.session_options()", "sse9")
    assert done.returncode != 0
    assert "EDGELM_ISA=sse9: there is no such instruction set. Set it to one of" in done.stderr


def test_one_session_may_run_on_several_threads() -> None:
    rng = np.random.default_rng(2)
    experts = [
        (random_matrix(rng, "int4", 2 * 64, D, group=32, swiglu=True), random_matrix(rng, "int4", D, 64, group=32))
        for _ in range(6)
    ]
    layer = {"router": random_matrix(rng, "float32", 6, D).blob, "experts": pack_experts(experts)}
    # From one token to more than a megabyte of intermediate results, so that the pool allocates and frees blocks.
    inputs = [rng.standard_normal((1, tokens, D)).astype(np.float32) for tokens in (1, 3, 40, 900, 1, 300, 7, 1)]
    moe = session("SparseMoE", layer | {"x": inputs[0]}, k=2, threads=2)
    alone = [moe.run(["y"], {"x": x})[0].tobytes() for x in inputs]

    def many(first: int) -> None:
        for i in range(60):
            at = (first + i) % len(inputs)
            assert moe.run(["y"], {"x": inputs[at]})[0].tobytes() == alone[at]

    with ThreadPoolExecutor(4) as pool:
        for result in [pool.submit(many, i) for i in range(4)]:
            result.result()


def test_sessions_may_run_at_the_same_time() -> None:
    rng = np.random.default_rng(4)
    x = rng.standard_normal((70, D)).astype(np.float32)
    matrices = [random_matrix(rng, kind, 300, D, group=32).blob for kind in ("int4", "int8")]
    sessions = [session("QuantLinear", {"x": x, "weights": matrix}, threads=2) for matrix in matrices]
    alone = [s.run(None, {"x": x})[0].tobytes() for s in sessions]

    def many(which: int) -> None:
        for _ in range(100):
            assert sessions[which].run(None, {"x": x})[0].tobytes() == alone[which]

    with ThreadPoolExecutor(2) as pool:
        for result in [pool.submit(many, i) for i in range(2)]:
            result.result()
