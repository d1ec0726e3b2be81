"""Does RMSNorm norm rows and then add the residual, and do errors name the wrong input?"""

from __future__ import annotations

import re

import numpy as np
import pytest
from operator_models import Array, feeds, run, session

U = 2.0**-24  # unit roundoff of float32
Generator = np.random.Generator


def floats(rng: Generator, *shape: int) -> Array:
    return rng.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("columns", [1, 7, 16, 33, 500, 2048])
@pytest.mark.parametrize("rows", [1, 4, 5, 40])
def test_a_row_is_divided_by_its_root_mean_square(rng: Generator, rows: int, columns: int) -> None:
    x, weight, residual = floats(rng, rows, columns), floats(rng, columns), floats(rng, rows, columns)
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 0.25) * weight
    inputs = {"x": x, "weight": weight}
    (y,) = run("RMSNorm", inputs, threads=2, epsilon=0.25)
    # Half a step each for: mean's additions (a lane's, 4 across), division, epsilon, root, inverse, two
    # multiplications.
    assert (np.abs(y - expected) <= (columns // 16 + 12) * U * np.abs(expected)).all()
    (added,) = run("RMSNorm", inputs | {"residual": residual}, threads=2, epsilon=0.25)
    assert added.tobytes() == (y + residual).tobytes()


def test_leading_dimensions_are_rows(rng: Generator) -> None:
    x, weight = floats(rng, 2, 3, 5, 64), floats(rng, 64)
    (y,) = run("RMSNorm", {"x": x, "weight": weight})
    (flat,) = run("RMSNorm", {"x": x.reshape(30, 64), "weight": weight})
    assert y.shape == x.shape
    assert y.tobytes() == flat.tobytes()
    (vector,) = run("RMSNorm", {"x": x[0, 0, 0], "weight": weight})
    assert vector.tobytes() == y[0, 0, 0].tobytes()


def test_a_row_does_not_depend_on_the_others_and_epsilon_is_a_default(rng: Generator) -> None:
    x, weight, residual = floats(rng, 300, 96), floats(rng, 96), floats(rng, 300, 96)
    x[7, 3], x[9] = np.nan, 0
    inputs = {"x": x, "weight": weight, "residual": residual}
    s = session("RMSNorm", inputs, threads=2)
    (y,) = s.run(None, feeds(s, inputs))
    for rows in [*range(1, 18), 64]:
        (some,) = s.run(None, {"x": x[:rows], "residual": residual[:rows]})
        assert some.tobytes() == y[:rows].tobytes(), rows
    assert np.isnan(y[7]).all()
    assert np.array_equal(y[9], residual[9])
    assert np.isfinite(np.delete(y, 7, 0)).all()
    assert run("RMSNorm", inputs, epsilon=1e-5)[0].tobytes() == y.tobytes()


def test_a_weight_may_be_fed_and_no_rows_give_no_rows(rng: Generator) -> None:
    x, weight = floats(rng, 5, 64), floats(rng, 64)
    (fed,) = run("RMSNorm", {"x": x, "weight": weight}, constant=[])
    assert fed.tobytes() == run("RMSNorm", {"x": x, "weight": weight})[0].tobytes()
    (y,) = run("RMSNorm", {"x": np.zeros((2, 0, 64), np.float32), "weight": weight})
    assert y.shape == (2, 0, 64)


X = np.ones((2, 64), np.float32)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"x": np.float32(1)}, "x has shape [], expected [..., columns]"),
        ({"x": X[:, :0]}, "x has shape [2, 0], expected [..., columns]"),
        ({"weight": X[0, :32]}, "weight has shape [32], expected [64], one value per column of x"),
        ({"weight": X}, "weight has shape [2, 64], expected [64], one value per column of x"),
        ({"residual": X[:1]}, "residual has shape [1, 64], expected [2, 64] like the result"),
    ],
)
def test_what_does_not_fit_is_named(inputs: dict[str, Array], message: str) -> None:
    given = {"x": X, "weight": X[0]} | {name: np.asarray(array) for name, array in inputs.items()}
    with pytest.raises(Exception, match=re.escape(f"RMSNorm layers.3/norm: {message}")):
        run("RMSNorm", given, node="layers.3/norm")
