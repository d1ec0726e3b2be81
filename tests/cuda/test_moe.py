"""Do the GPU's MoE kernels route like PyTorch, sort all (token, expert) pairs, and sum in a fixed order?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import moe_calls as moe
import numpy as np
import pytest
from kernel_device import kernel_device, order_threads, release
from moe_calls import MoeShape
from numpy.typing import NDArray

from edgelm.errors import DeviceError
from edgelm.runtimes.cuda.device import Launch

Array = NDArray[Any]
U = 2.0**-24  # unit roundoff of float32
TOKENS = [*range(1, 18), 33, 64]
ACTIVATIONS = {"f32": (np.float32, U), "f16": (np.float16, 2.0**-11), "bf16": (np.uint16, 2.0**-8)}


class Layer:
    """A device with buffers of numpy arrays."""

    def __init__(self) -> None:
        self.device = kernel_device([name for name in moe.all_kernels() if not name.startswith("moe_down_")])

    def put(self, array: Array) -> int:
        address = self.device.allocate(array.nbytes)
        self.device.upload(address, array)
        return address

    def get(self, address: int, shape: tuple[int, ...], dtype: Any = np.float32) -> Array:
        out = np.empty(shape, dtype)
        self.device.download(address, out)
        return out

    def run(self, launches: list[Launch], seed: int = 0) -> None:
        order_threads(self.device, seed)
        for launch in launches:
            self.device.launch(launch)
        self.device.synchronize()


@pytest.fixture(scope="module")
def device() -> Iterator[Layer]:
    layer = Layer()
    yield layer
    release(layer.device)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(11)


def as_float(array: Array) -> Array:
    """Convert the kernels' results to float64; uint16 is bfloat16."""
    if array.dtype == np.uint16:
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float64)


def check(actual: Array, expected: Array, tolerance: Array) -> None:
    excess = np.abs(actual - expected) - tolerance
    worst = np.unravel_index(np.argmax(excess), excess.shape)
    assert excess[worst] <= 0, f"at {worst}: {actual[worst]}, expected {expected[worst]} within {tolerance[worst]}"


# -- router ------------------------------------------------------------------------------------------------------------


def routed(
    device: Layer, shape: MoeShape, x: Array, norm: Array, router: Array, seed: int = 0, tile: int = 0
) -> tuple[Array, Array]:
    dtype = ACTIVATIONS[shape.activation][0]
    logits = device.put(np.full((shape.tokens, shape.experts), np.nan, np.float32))
    normed = device.put(np.full((shape.tokens, shape.columns), 0xFF, np.uint8).repeat(np.dtype(dtype).itemsize, 1))
    addresses = device.put(x), device.put(norm), device.put(router), logits, normed
    device.run([moe.router_launch(shape, *addresses, tile)], seed)
    return (
        device.get(logits, (shape.tokens, shape.experts)),
        as_float(device.get(normed, (shape.tokens, shape.columns), dtype)),
    )


def check_router(device: Layer, rng: np.random.Generator, shape: MoeShape, seed: int = 0, tile: int = 0) -> None:
    x = (rng.standard_normal((shape.tokens, shape.columns)) * rng.uniform(0.1, 30, (shape.tokens, 1))).astype("f4")
    norm = rng.uniform(0.5, 2, shape.columns).astype(np.float32)
    router = rng.standard_normal((shape.experts, shape.columns)).astype(np.float32)
    logits, normed = routed(device, shape, x, norm, router, seed, tile)
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide * wide).mean(-1, keepdims=True) + shape.epsilon) * norm
    # The factor of a row: half of the error of a sum of D squares, and of root, division and two multiplications.
    factor = (shape.columns / 2 + 6) * U
    check(normed, expected, (factor + ACTIVATIONS[shape.activation][1]) * np.abs(expected) + 2.0**-25)
    most = np.abs(expected) @ np.abs(router.astype(np.float64)).T
    check(logits, expected @ router.astype(np.float64).T, (shape.columns * U + factor) * most)


@pytest.mark.parametrize("tokens", TOKENS)
def test_router_gives_logits_and_normed_rows(device: Layer, rng: np.random.Generator, tokens: int) -> None:
    for experts, columns in ((8, 72), (32, 256), (64, 128)):
        activation = list(ACTIVATIONS)[(tokens + experts // 8) % 3]
        check_router(device, rng, MoeShape(tokens, columns, 64, experts, 1, activation=activation), tokens % 3)


@pytest.mark.parametrize("experts", [1, 7, 65, 256])
def test_router_takes_any_number_of_experts_and_wide_rows(
    device: Layer, rng: np.random.Generator, experts: int
) -> None:
    for tokens, columns in ((1, 4104), (5, 1032)):
        check_router(device, rng, MoeShape(tokens, columns, 64, experts, 1, activation="f32"))


@pytest.mark.parametrize(("experts", "columns", "seed"), [(8, 40, 0), (64, 128, 1), (65, 136, 7)])
def test_router_in_tiles_gives_the_same(
    device: Layer, rng: np.random.Generator, experts: int, columns: int, seed: int
) -> None:
    for tile in (32, 16, 8):
        for tokens, activation in ((1, "f32"), (31, "f16"), (45, "bf16")):
            shape = MoeShape(tokens, columns, 64, experts, 1, activation=activation)
            assert moe.router_launch(shape, 0, 0, 0, 0, 0, tile).kernel == f"moe_router_{activation}_t{tile}"
            check_router(device, rng, shape, seed, tile)


def test_many_tokens_are_routed_in_tiles(device: Layer, rng: np.random.Generator) -> None:
    shape = MoeShape(257, 64, 64, 8, 1)
    for tokens, kind in ((256, "n4"), (257, "t8"), (1536, "t8"), (2048, "t16"), (4096, "t32")):
        assert moe.router_launch(replace(shape, tokens=tokens), 0, 0, 0, 0, 0).kernel == f"moe_router_bf16_{kind}"
    check_router(device, rng, shape)


def test_a_token_of_nans_does_not_affect_its_neighbours(device: Layer, rng: np.random.Generator) -> None:
    x = rng.standard_normal((6, 64)).astype(np.float32)
    norm, router = np.ones(64, np.float32), rng.standard_normal((8, 64)).astype(np.float32)
    damaged = x.copy()
    damaged[2, 5] = np.nan
    damaged[4] = 0
    shape = MoeShape(6, 64, 64, 8, 2, activation="f32")
    for tile in (0, 8):
        whole, broken = (routed(device, shape, rows, norm, router, tile=tile) for rows in (x, damaged))
        for before, after in zip(whole, broken, strict=True):
            assert (before[[0, 1, 3, 5]] == after[[0, 1, 3, 5]]).all()
            assert np.isnan(after[2]).all()
            assert (after[4] == 0).all()


# -- choice and order --------------------------------------------------------------------------------------------------


def chosen(device: Layer, shape: MoeShape, logits: Array, seed: int = 0) -> dict[str, Array]:
    """Run choice and sorting, check that the results are consistent; return experts and weights [M, k] by slot."""
    places = moe.workspace(shape, device.device.allocate(moe.workspace_bytes(shape)))
    device.run(moe.choose_launches(shape, device.put(logits), places), seed)
    pairs = (shape.tokens, shape.k)
    offsets = device.get(places.offsets, (shape.experts + 1,), np.int32)
    row_map = device.get(places.row_map, (shape.slots,), np.int32)
    slot_of = device.get(places.slot_of, pairs, np.int32)
    active = device.get(places.active, (1 + shape.most_active, 4), np.int32)

    counts = np.diff(offsets)
    assert offsets[0] == 0
    assert offsets[-1] == shape.slots
    assert (counts >= 0).all()
    expert_of = np.repeat(np.arange(shape.experts), counts)
    assert sorted(slot_of.ravel()) == list(range(shape.slots))
    assert (row_map[slot_of] == np.arange(shape.tokens)[:, None]).all()
    assert (np.diff(expert_of * shape.tokens + row_map) > 0).all()  # by expert, then by token, no pair twice
    assert (np.diff(slot_of, axis=1) > 0).all()
    chosen_ones = np.flatnonzero(counts)
    assert (active[0] == [len(chosen_ones), 0, 0, 0]).all()
    entries = np.stack([chosen_ones, offsets[chosen_ones], counts[chosen_ones], 0 * chosen_ones], axis=1)
    assert (active[1 : 1 + len(entries)] == entries).all()
    assert (active[1 + len(entries) :] == 0).all()
    weights = device.get(places.slot_weights, (shape.slots,))[slot_of]
    return {"experts": expert_of[slot_of], "weights": weights}


def softmax(logits: Array) -> Array:
    with np.errstate(all="ignore"):
        wide = logits.astype(np.float64)
        powers = np.exp(wide - wide.max(-1, keepdims=True))
        return np.asarray(powers / powers.sum(-1, keepdims=True))


def reference(logits: Array, k: int, normalize: bool) -> tuple[Array, Array]:
    """Return the experts in the order of their indices, and their weights. Ties of logits must be ties in float32
    too."""
    probabilities = softmax(logits)
    order = np.argsort(-np.where(np.isnan(probabilities), -1, probabilities), axis=-1, kind="stable")[:, :k]
    order.sort(axis=-1)
    weights = np.take_along_axis(probabilities, order, -1)
    return order, weights / weights.sum(-1, keepdims=True) if normalize else weights


def check_choice(device: Layer, shape: MoeShape, logits: Array, seed: int = 0) -> None:
    found = chosen(device, shape, logits, seed)
    experts, weights = reference(logits, shape.k, shape.normalize)
    assert (found["experts"] == experts).all()
    # The argument of exp is rounded, exp is accurate to 2 units, and the sum has E terms of one sign.
    spread = np.ptp(logits.astype(np.float64), axis=-1, keepdims=True)
    check(found["weights"], weights, (2 * spread + 2 * shape.experts + 12) * U * weights + 2.0**-126)


@pytest.mark.parametrize("tokens", TOKENS)
def test_every_token_goes_to_its_most_probable_experts(device: Layer, rng: np.random.Generator, tokens: int) -> None:
    for experts, k in ((8, 1), (8, 8), (32, 3), (64, 8), (64, 2)):
        # Logits differ by at least 0.01, so rounding does not change the order.
        logits = rng.permuted(np.tile(np.arange(experts) * 0.01, (tokens, 1)), axis=1)
        logits += rng.uniform(-5, 5, (tokens, 1))
        shape = MoeShape(tokens, 64, 64, experts, k, normalize=(tokens + k) % 2 == 1)
        check_choice(device, shape, logits.astype(np.float32), (0, 1, 7)[(tokens + experts // 8) % 3])


@pytest.mark.parametrize("seed", [0, 1, 7])
@pytest.mark.parametrize(("experts", "k"), [(1, 1), (5, 4), (33, 16), (100, 7), (256, 16)])
def test_any_number_of_experts(device: Layer, rng: np.random.Generator, experts: int, k: int, seed: int) -> None:
    for tokens in (3, 32, 71):
        logits = rng.permuted(np.tile(np.arange(experts) * 0.01, (tokens, 1)), axis=1).astype(np.float32)
        check_choice(device, MoeShape(tokens, 64, 64, experts, k, normalize=True), logits, seed)


@pytest.mark.parametrize("tokens", [1, 9, 64])
def test_of_equal_probabilities_the_lower_index_is_chosen(device: Layer, rng: np.random.Generator, tokens: int) -> None:
    for experts, k in ((8, 3), (64, 8), (256, 16)):
        logits = rng.integers(0, 3, (tokens, experts)).astype(np.float32)
        logits[0] = 1
        check_choice(device, MoeShape(tokens, 64, 64, experts, k), logits)
    found = chosen(device, MoeShape(1, 64, 64, 64, 8), np.zeros((1, 64), np.float32))
    assert (found["experts"] == np.arange(8)).all()
    assert (found["weights"] == 1 / 64).all()


@pytest.mark.parametrize("tokens", [1, 17, 32, 33, 130])
def test_all_tokens_may_go_to_one_expert(device: Layer, tokens: int) -> None:
    logits = np.zeros((tokens, 8), np.float32)
    logits[:, 5] = 200  # e^-200 is 0 in float32
    found = chosen(device, MoeShape(tokens, 64, 64, 8, 1), logits)
    assert (found["experts"] == 5).all()
    assert (found["weights"] == 1).all()
    found = chosen(device, MoeShape(tokens, 64, 64, 8, 2, normalize=True), logits)
    assert (found["experts"] == [0, 5]).all()
    assert (found["weights"] == [0, 1]).all()


@pytest.mark.parametrize("normalize", [False, True])
def test_any_input_chooses_k_experts(device: Layer, normalize: bool) -> None:
    inf, nan = np.inf, np.nan
    rows = [[nan] * 6, [inf] * 6, [-inf] * 6, [nan, 1, 2, 3, 4, 5], [0, 0, inf, 0, 0, 0], [0, -inf, 1, -inf, -inf, 2]]
    for repeat in (1, 7):
        logits = np.array(rows * repeat, np.float32)
        found = chosen(device, MoeShape(len(logits), 64, 64, 6, 4, normalize=normalize), logits)
        # A NaN or an infinity makes all probabilities NaN, as in PyTorch; -inf is a probability of 0.
        assert (found["experts"] == ([[0, 1, 2, 3]] * 5 + [[0, 1, 2, 5]]) * repeat).all()
        assert np.isnan(found["weights"].reshape(repeat, 6, 4)[:, :5]).all()
        expected = np.array([1, 0, np.e, np.e**2]) / (1 + np.e + np.e**2)
        assert np.allclose(found["weights"][5::6], expected, rtol=8 * U, atol=0)


@pytest.mark.parametrize("seed", [0, 1, 7])
@pytest.mark.parametrize("tokens", [1, 2, 3, 17, 32])
def test_one_launch_routes_as_two_do(device: Layer, rng: np.random.Generator, tokens: int, seed: int) -> None:
    for experts, k, activation in ((7, 7, "f32"), (64, 8, "bf16"), (200, 16, "f16")):
        shape = MoeShape(tokens, 136, 64, experts, k, normalize=True, activation=activation)
        x = device.put(rng.standard_normal((tokens, 136)).astype(np.float32))
        norm = device.put(rng.uniform(0.5, 2, 136).astype(np.float32))
        router = device.put(rng.standard_normal((experts, 136)).astype(np.float32))
        counter = device.put(np.zeros(1, np.int32))
        results = []
        for given in (counter, counter, 0):
            size = moe.workspace_bytes(shape)
            memory = device.put(np.full(size, 0xEE, np.uint8))
            places = moe.workspace(shape, memory)
            launches = moe.route_launches(shape, x, norm, router, places.logits, places, given)
            assert len(launches) == (1 if given else 2)
            device.run(launches, seed)
            results.append(device.get(memory, (size,), np.uint8).tobytes())
        assert results[0] == results[1] == results[2]  # the counter was reset to 0 for the second run


# -- the sum -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "columns", "k"), [(1, 16, 1), (3, 520, 8), (40, 72, 3)])
def test_experts_are_summed_in_the_order_of_their_indices(
    device: Layer, rng: np.random.Generator, tokens: int, columns: int, k: int
) -> None:
    shape = MoeShape(tokens, columns, 64, 8, k)
    x = rng.standard_normal((tokens, columns)).astype(np.float32)
    outputs = rng.standard_normal((shape.slots, columns)).astype(np.float32)
    weights = rng.uniform(0, 1, shape.slots).astype(np.float32)
    slot_of = np.sort(rng.permutation(shape.slots).reshape(tokens, k).astype(np.int32), axis=1)
    expected = x.astype(np.float64)
    for j in range(k):  # fused multiply-add: one rounding
        term = weights[slot_of[:, j], None].astype(np.float64) * outputs[slot_of[:, j]].astype(np.float64)
        expected = (expected + term).astype(np.float32).astype(np.float64)
    y = device.put(x)
    device.run([moe.combine_launch(shape, y, device.put(outputs), device.put(weights), device.put(slot_of), y)])
    assert (device.get(y, x.shape) == expected).all()


def test_shapes_that_no_kernel_takes_are_refused() -> None:
    good = MoeShape(4, 64, 32, 8, 2)
    for change, message in (
        ({"tokens": 0}, "tokens is 0"),
        ({"columns": 60}, "columns is 60, expected a multiple of 8"),
        ({"hidden": 4}, "hidden is 4"),
        ({"experts": 257}, "experts is 257, expected 1 to 256"),
        ({"k": 9}, "k is 9, expected 1 to 8 of 8 experts"),
        ({"experts": 64, "k": 17}, "k is 17, expected 1 to 16"),
        ({"activation": "int8"}, "activation is 'int8', expected one of bf16, f16, f32"),
        ({"tokens": 1 << 29}, "divide the prompt"),
    ):
        with pytest.raises(DeviceError, match=message):
            moe.workspace_bytes(replace(good, **change))


def test_a_workspace_has_room_for_fewer_tokens() -> None:
    sizes = [moe.workspace_bytes(MoeShape(tokens, 64, 32, 64, 8)) for tokens in range(1, 100)]
    assert sizes == sorted(sizes)
