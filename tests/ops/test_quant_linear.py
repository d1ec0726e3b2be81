"""Does QuantLinear compute y = x W^T for every kind of weights, and do errors name the wrong input?"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from operator_models import Array, feeds, run, session
from packed_weights import FLOAT_KINDS, INTEGER_KINDS, KINDS, Packed, pack, random_matrix

from edgelm.runtimes.onnxruntime.native_library import ExactLogits

U = 2.0**-24  # unit roundoff of float32
Generator = np.random.Generator


def floats(rng: Generator, *shape: int) -> NDArray[np.float32]:
    return rng.standard_normal(shape).astype(np.float32)


def quantised(x: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return x [..., K] as int8 activations represent it: round(x * 127 / max|x|) in blocks of 32."""
    blocks = x.reshape(*x.shape[:-1], -1, 32)
    largest = np.abs(blocks).max(-1, keepdims=True)
    codes = np.rint(blocks * (np.float32(127) / largest)).astype(np.float64)
    return (codes * (largest / np.float32(127)).astype(np.float64)).reshape(x.shape)


def assert_close(y: Array, expected: Array, tolerance: Array) -> None:
    error = np.abs(y - expected)
    worst = np.unravel_index(np.argmax(error - tolerance), error.shape)
    assert (error <= tolerance).all(), f"{worst}: {y[worst]} for {expected[worst]}, tolerance {tolerance[worst]}"


def check_matmul(y: Array, x: Array, matrix: Packed, terms: int) -> None:
    """Check y. `terms`: number of float32 roundings of an element of x W^T."""
    magnitude = np.abs(x) @ np.abs(matrix.dense.T)
    if not matrix.swiglu:
        return assert_close(y, x @ matrix.dense.T, terms * U * magnitude)
    gate, up = np.split(x @ matrix.dense.T, 2, axis=-1)
    gate_error, up_error = np.split(terms * U * magnitude, 2, axis=-1)
    silu = gate / (1 + np.exp(-gate))
    # silu's slope is at most 1.1; exp is accurate to 2 units in the last place, and three operations follow.
    tolerance = 1.1 * gate_error * np.abs(up) + (np.abs(silu) + 1.1 * gate_error) * up_error
    return assert_close(y, silu * up, tolerance + 8 * U * np.abs(silu * up))


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_float_activations_are_multiplied_by_the_exact_weights(rng: Generator, kind: str, swiglu: bool) -> None:
    matrix = random_matrix(rng, kind, 2 * 45, 160, group=32, swiglu=swiglu)
    x = floats(rng, 2, 5, 160)
    (y,) = run("QuantLinear", {"x": x, "weights": matrix.blob}, activations="float32")
    assert y.shape == (2, 5, 45 if swiglu else 90)
    check_matmul(y, x.astype(np.float64), matrix, 160 + 2)


@pytest.mark.parametrize("scales", ["float16", "float32"])
@pytest.mark.parametrize("group", [32, 64, 192])
# The layout has no zero points for split nibbles.
@pytest.mark.parametrize(("kind", "zeros"), [(kind, zeros) for kind in INTEGER_KINDS for zeros in (False, True)][:-1])
def test_int8_activations_are_multiplied_as_codes(
    rng: Generator, kind: str, group: int, zeros: bool, scales: str
) -> None:
    matrix = random_matrix(rng, kind, 70, 192, group=group, zeros=zeros, scales=scales)
    x = floats(rng, 11, 192)
    (y,) = run("QuantLinear", {"x": x, "weights": matrix.blob})
    check_matmul(y, quantised(x), matrix, 192 // 32 + 3)


@pytest.mark.parametrize("kind", INTEGER_KINDS)
def test_swiglu_with_int8_activations(rng: Generator, kind: str) -> None:
    matrix = random_matrix(rng, kind, 2 * 50, 96, group=32, swiglu=True)
    x = floats(rng, 9, 96)
    (y,) = run("QuantLinear", {"x": x, "weights": matrix.blob})
    check_matmul(y, quantised(x), matrix, 96 // 32 + 3)


@pytest.mark.parametrize("kind", FLOAT_KINDS)
def test_float_kinds_ignore_int8(rng: Generator, kind: str) -> None:
    matrix, x = random_matrix(rng, kind, 40, 72), floats(rng, 3, 72)
    (y,) = run("QuantLinear", {"x": x, "weights": matrix.blob}, activations="int8")
    (expected,) = run("QuantLinear", {"x": x, "weights": matrix.blob}, activations="float32")
    assert y.tobytes() == expected.tobytes()


def normed(x: Array, norm: Array, **attributes: Any) -> Array:
    """RMSNorm by QuantLinear with an identity matrix, which is exact: all other terms of its sums are 0."""
    identity = pack("float32", np.eye(x.shape[-1], dtype=np.float32), x.shape[-1])
    return run("QuantLinear", {"x": x, "weights": identity, "norm": norm}, activations="float32", **attributes)[0]


@pytest.mark.parametrize("rows", [1, 4, 5, 40])
@pytest.mark.parametrize("activations", ["int8", "float32"])
def test_norm_is_fused_exactly(rng: Generator, rows: int, activations: str) -> None:
    x, norm = floats(rng, rows, 96), rng.uniform(0.5, 2, 96).astype(np.float32)
    matrix = random_matrix(rng, "int4", 64, 96, group=32)
    before = normed(x, norm, epsilon=0.25)
    exact = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 0.25) * norm
    # Half a step for each of: mean's additions (6 a lane, 4 across), division, epsilon, root, inverse, two
    # multiplications.
    assert_close(before, exact, 12 * U * np.abs(exact))
    inputs = {"x": x, "weights": matrix.blob, "norm": norm}
    (fused,) = run("QuantLinear", inputs, activations=activations, epsilon=0.25)
    (separate,) = run("QuantLinear", {"x": before, "weights": matrix.blob}, activations=activations)
    assert fused.tobytes() == separate.tobytes()


@pytest.mark.parametrize("activations", ["int8", "float32"])
def test_residual_is_added_last(rng: Generator, activations: str) -> None:
    matrix, x = random_matrix(rng, "int8", 50, 64, group=32), floats(rng, 2, 3, 64)
    residual = floats(rng, 2, 3, 50)
    (plain,) = run("QuantLinear", {"x": x, "weights": matrix.blob}, activations=activations)
    (y,) = run("QuantLinear", {"x": x, "weights": matrix.blob, "residual": residual}, activations=activations)
    assert y.tobytes() == (plain + residual).tobytes()


@pytest.mark.parametrize("rows", [1, 6, 40])
@pytest.mark.parametrize("activations", ["int8", "float32"])
def test_a_bias_is_added_first_and_then_a_residual(rng: Generator, activations: str, rows: int) -> None:
    for kind in ("int4", "split", "float32"):
        matrix, x = random_matrix(rng, kind, 50, 64, group=32), floats(rng, rows, 64)
        bias, residual, norm = floats(rng, 50), floats(rng, rows, 50), rng.uniform(0.5, 2, 64).astype(np.float32)
        inputs = {"x": x, "weights": matrix.blob, "norm": norm}
        (plain,) = run("QuantLinear", inputs, activations=activations)
        (y,) = run("QuantLinear", inputs | {"bias": bias}, activations=activations)
        assert y.tobytes() == (plain + bias).tobytes()
        (fed,) = run("QuantLinear", inputs | {"bias": bias}, constant=[], activations=activations)
        assert fed.tobytes() == y.tobytes()
        (y,) = run("QuantLinear", inputs | {"bias": bias, "residual": residual}, activations=activations)
        assert y.tobytes() == (plain + bias + residual).tobytes()


@pytest.mark.parametrize("kind", ["int4", "split", "bfloat16"])
def test_a_row_does_not_depend_on_the_others(rng: Generator, kind: str) -> None:
    matrix, norm = random_matrix(rng, kind, 200, 256, group=64), rng.uniform(0.5, 2, 256).astype(np.float32)
    x = floats(rng, 1300, 256)  # more than one task of rows for both types of activations
    inputs = {"x": x, "weights": matrix.blob, "norm": norm}
    s = session("QuantLinear", inputs, threads=2)
    (y,) = s.run(None, feeds(s, inputs))
    for rows in [*range(1, 18), 64, 300]:
        (some,) = s.run(None, {"x": x[1300 - rows :]})
        assert some.tobytes() == y[1300 - rows :].tobytes(), rows


def test_a_row_that_is_not_finite_affects_only_itself(rng: Generator) -> None:
    matrix, x = random_matrix(rng, "int4", 40, 64, group=32), floats(rng, 6, 64)
    (good,) = run("QuantLinear", {"x": x, "weights": matrix.blob})
    x[1, 5], x[4, 40] = np.nan, np.inf
    (y,) = run("QuantLinear", {"x": x, "weights": matrix.blob})
    assert np.isnan(y[[1, 4]]).all()
    assert np.delete(y, [1, 4], 0).tobytes() == np.delete(good, [1, 4], 0).tobytes()


@pytest.mark.parametrize("rescored", [1, 7, 40, 1000])
def test_rescored_logits_are_exact_where_they_are_largest(rng: Generator, rescored: int) -> None:
    matrix, x = random_matrix(rng, "split", 5000, 64, group=32), floats(rng, 1, 1, 64)
    inputs = {"x": x, "weights": matrix.blob}
    exact = run("QuantLinear", inputs)[0].ravel()
    y = run("QuantLinear", inputs, refine=rescored)[0].ravel()
    # Without the low nibbles a code is wrong by at most half their range, 8 of 256.
    scale = np.abs(matrix.dense).max(1) / 127
    bound = 8.5 * scale * np.abs(quantised(x)).sum()
    assert (np.abs(y - exact) <= bound + 1e-6).all()
    same = y == exact
    assert same[np.argsort(-y)[:rescored]].all()
    tiles = -(-5000 // 32)
    assert same.all() if rescored >= tiles else not same.all()


def test_all_logits_are_exact_in_a_thread_that_asks_for_it(rng: Generator) -> None:
    matrix = random_matrix(rng, "split", 4096, 64, group=64)
    inputs = {"x": rng.standard_normal((1, 64)).astype(np.float32), "weights": matrix.blob}
    exact, rescored = (run("QuantLinear", inputs, **given)[0].tobytes() for given in ({}, {"refine": 5}))
    assert rescored != exact
    found: list[bytes] = []

    def compute() -> None:
        found.append(run("QuantLinear", inputs, refine=5)[0].tobytes())

    asking = ExactLogits()
    asking.call(compute)
    asking.call(lambda: asking.call(compute))
    asking.call(lambda: ThreadPoolExecutor(1).submit(compute).result())
    compute()
    assert found == [exact, exact, rescored, rescored]


def test_a_bias_decides_which_logits_are_rescored(rng: Generator) -> None:
    matrix, x, bias = random_matrix(rng, "split", 5000, 64, group=32), floats(rng, 1, 64), 100 * floats(rng, 5000)
    inputs = {"x": x, "weights": matrix.blob, "bias": bias}
    exact, y = run("QuantLinear", inputs)[0].ravel(), run("QuantLinear", inputs, refine=5)[0].ravel()
    assert (y == exact)[np.argsort(-exact)[:5]].all()
    assert not (y == exact).all()


def test_many_rows_are_always_exact(rng: Generator) -> None:
    matrix, x = random_matrix(rng, "split", 500, 64, group=32), floats(rng, 2, 64)
    inputs = {"x": x, "weights": matrix.blob}
    assert run("QuantLinear", inputs, refine=3)[0].tobytes() == run("QuantLinear", inputs)[0].tobytes()


def test_weights_may_be_fed(rng: Generator) -> None:
    matrix, x = random_matrix(rng, "int4", 64, 64, group=32), floats(rng, 5, 64)
    inputs = {"x": x, "weights": matrix.blob, "norm": np.ones(64, np.float32)}
    assert run("QuantLinear", inputs, constant=[])[0].tobytes() == run("QuantLinear", inputs)[0].tobytes()


def test_no_rows_give_no_rows(rng: Generator) -> None:
    matrix = random_matrix(rng, "int4", 64, 64, group=32)
    (y,) = run("QuantLinear", {"x": np.zeros((2, 0, 64), np.float32), "weights": matrix.blob})
    assert y.shape == (2, 0, 64)


INT4 = random_matrix(np.random.default_rng(5), "int4", 48, 64, group=32).blob
GLU = random_matrix(np.random.default_rng(5), "int4", 96, 64, group=32, swiglu=True).blob
X = np.ones((2, 64), np.float32)


def damaged(at: int, *values: int) -> Array:
    blob = INT4.copy()
    blob[at : at + len(values)] = values
    return blob


@pytest.mark.parametrize(
    ("inputs", "attributes", "message"),
    [
        ({"x": X[:, :32]}, {}, "x has shape [2, 32], weights are for 64 columns"),
        ({"x": np.float32(1)}, {}, "x has shape [], weights are for 64 columns"),
        (
            {"norm": np.ones(32, np.float32)},
            {},
            "norm has shape [32], expected [64], one value per column of the weights",
        ),
        ({"residual": X}, {}, "residual has shape [2, 64], expected [2, 48] like the result"),
        (
            {"weights": GLU, "residual": X[:, :48]},
            {},
            "a residual cannot be added to the result of a SwiGLU matrix",
        ),
        ({"bias": X[0]}, {}, "bias has shape [64], expected [48], one value per row of the weights"),
        ({"bias": X[:1, :48]}, {}, "bias has shape [1, 48], expected [48], one value per row of the weights"),
        ({"weights": GLU, "bias": X[0, :48]}, {}, "a bias cannot be added to the result of a SwiGLU matrix"),
        ({}, {"refine": 4}, "attribute refine is for weights of kind int8 in split nibbles"),
        ({}, {"refine": -1}, "attribute refine is -1, expected 0 or more"),
        ({}, {"activations": "int4"}, "attribute activations is int4, expected int8 or float32"),
        ({}, {"activations": 8}, "attribute activations is not a string"),
        ({}, {"epsilon": "small"}, "attribute epsilon is not a float"),
        ({}, {"refine": 1.5}, "attribute refine is not an integer"),
        (
            {"weights": INT4.reshape(2, -1)},
            {},
            f"weights must be packed weights, uint8 [bytes], and has shape [2, {len(INT4) // 2}]",
        ),
        (
            {"weights": INT4[:-1]},
            {},
            f"weights: not a packed matrix, it is shorter than its shape needs ({len(INT4) - 1} bytes)",
        ),
        ({"weights": INT4[:20]}, {}, "weights: not a packed matrix, it is shorter than its header (20 bytes)"),
        ({"weights": damaged(0, 0)}, {}, "weights: not a packed matrix, it does not begin with EDLM"),
        ({"weights": damaged(4, 9)}, {}, "its layout version is not 1"),
        ({"weights": damaged(5, 77)}, {}, "its kind of weights is unknown"),
        ({"weights": damaged(8, *[255] * 8)}, {}, "its shape is not possible"),
        ({"weights": damaged(24, 48)}, {}, "its group is neither 16 nor a multiple of 32"),
    ],
)
@pytest.mark.parametrize("constant", [True, False])
def test_what_does_not_fit_is_named(
    inputs: dict[str, Array], attributes: dict[str, Any], message: str, constant: bool
) -> None:
    given = {"x": X, "weights": INT4} | {name: np.asarray(array) for name, array in inputs.items()}
    with pytest.raises(Exception, match=re.escape("QuantLinear layers.3/o: ") + ".*" + re.escape(message)):
        run("QuantLinear", given, constant=None if constant else [], node="layers.3/o", **attributes)


@pytest.mark.parametrize(
    ("name", "said"),
    [("weights", "weights begin at an address"), ("x", "an input of shape [1, 64] begins at an address")],
)
def test_what_lies_at_an_odd_address_is_refused(name: str, said: str) -> None:
    """This happens if a tensor's offset in a file is damaged: the scalar kernels read numbers in place."""
    given = {"x": X.reshape(-1, 64)[:1], "weights": INT4}
    room = np.empty(given[name].nbytes + 8, np.uint8)
    start = 1 + -room.ctypes.data % 4
    room[start : start + given[name].nbytes] = np.frombuffer(given[name].tobytes(), np.uint8)
    moved = np.frombuffer(room.data, given[name].dtype, given[name].size, start).reshape(given[name].shape)
    message = f"QuantLinear layers.3/o: {said} that is not a multiple of 4: align"
    with pytest.raises(Exception, match=re.escape(message)):
        run("QuantLinear", given | {name: moved}, constant=[], node="layers.3/o")


def test_attribute_name_goes_before_the_nodes(rng: Generator) -> None:
    s = session("QuantLinear", {"x": X, "weights": INT4}, label="layers.3/qkv")
    with pytest.raises(Exception, match=re.escape("QuantLinear layers.3/qkv: x has shape")):
        s.run(None, {"x": X[:, :5]})


def test_other_types_are_refused_by_the_runtime() -> None:
    with pytest.raises(Exception, match=re.escape("'tensor(double)' of input parameter (x)")):
        run("QuantLinear", {"x": X.astype(np.float64), "weights": INT4})
