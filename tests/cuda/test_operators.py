"""Do a node's launches follow from its attributes and the sizes of its weights? One emulated node at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from gpu_packing import pack, random_numbers
from kernel_device import kernel_device
from numpy.typing import NDArray

from edgelm.bundle.gpu_layout import GpuKind, GpuMatrix
from edgelm.errors import BundleError
from edgelm.runtimes.cuda.operators import Operators, Scratch, Step
from edgelm.runtimes.cuda.program import Node, Program, Value, Weight, matrix_attrs

Array = NDArray[Any]
H, G, S, C = 4, 2, 32, 64
ATTENTION = Node(
    "GroupQueryAttention", "layers.0.attn",
    ("qkv", "past_key_values.0.key", "past_key_values.0.value", "past_lengths", "cos", "sin", "q_norm", "k_norm"),
    ("logits", "present.0.key", "present.0.value"),
    {"num_heads": H, "kv_num_heads": G, "head_size": S, "activation": "f32", "kv": "float32", "epsilon": 1e-5,
     "clip": 0.0},
)  # fmt: skip


def program_of(node: Node, values: Mapping[str, Value], weights: Mapping[str, Array]) -> Program:
    """Return a program of this node, and of a node that produces each of its input values."""
    end, described = 0, {}
    for name, data in weights.items():
        kind = "uint8" if data.dtype == np.uint8 else "f32"
        described[name] = Weight(kind, data.shape, end, data.nbytes)
        end += -(-data.nbytes // 256) * 256
    makers = [Node("Made", name, (), (name,), {}) for name in values if name not in node.outputs]
    program = Program((*makers, node), values, described)
    return replace(Program.from_json(program.to_json(), "program.json"), nodes=(node,))


def run(program: Program, step: Step, given: Mapping[str, Array], width: int, capacity: int = C) -> Array:
    """Run the node; return its first output, float32 [rows, width]. `given` are its inputs; caches are updated."""
    (node,) = program.nodes
    operators = Operators(program, str(node.attrs.get("kv", "float32")), capacity, kernel_device().info)
    device = kernel_device(operators.kernels())
    at = {"": 0} | {name: device.allocate(max(data.nbytes, 1)) for name, data in given.items()}
    for name, data in given.items():
        device.upload(at[name], data)
    y = np.empty((step.rows, width), np.float32)
    at |= dict.fromkeys(node.outputs, 0) | {node.outputs[0]: device.allocate(y.nbytes)}
    workspace, counters = operators.scratch_bytes(step.batch, step.rows)
    scratch = Scratch(device.allocate(workspace), device.allocate(max(counters, 1)))
    device.fill(scratch.counters, 0, counters)
    for launch in operators.launches(node, step, at, scratch):
        device.launch(launch)
    device.synchronize()
    device.download(at[node.outputs[0]], y)
    return y


def attention(qkv: Array, norms: Mapping[str, Array]) -> Array:
    """Return the result of an attention node for a sequence's first tokens."""
    angles = np.arange(C)[:, None] / 10000 ** (np.arange(S // 2) / (S // 2))
    tables = {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}
    node = replace(ATTENTION, inputs=(*ATTENTION.inputs[:6], *norms))
    values = {"qkv": Value("f32", qkv.shape[-1]), "logits": Value("f32", H * S)}
    program = program_of(node, values, tables | norms)
    caches = {name: np.zeros(G * C * S, np.float32) for name in node.inputs[1:3]}
    given = {"qkv": qkv, **caches, "past_lengths": np.zeros(1, np.int32), **tables, **norms}
    return run(program, Step(1, len(qkv)), given, H * S)


def normed(x: Array, weight: Array) -> Array:
    """RMSNorm over as many numbers as the weight has."""
    parts = x.astype(np.float64).reshape(len(x), -1, len(weight))
    return (parts / np.sqrt((parts * parts).mean(-1, keepdims=True) + 1e-5) * weight).reshape(x.shape)


@pytest.mark.parametrize(("q_heads", "k_heads"), [(H, G), (1, 1), (H, 1), (1, G)])
def test_the_size_of_a_norm_weight_says_whether_it_is_per_head(q_heads: int, k_heads: int) -> None:
    rng = np.random.default_rng(q_heads + 10 * k_heads)
    qkv = rng.standard_normal((5, (H + 2 * G) * S)).astype(np.float32)
    norms = {
        name: rng.uniform(0.5, 2, heads * S).astype(np.float32)
        for name, heads in (("q_norm", q_heads), ("k_norm", k_heads))
    }
    q, k, v = np.split(qkv, [H * S, (H + G) * S], axis=-1)
    before = np.concatenate([normed(q, norms["q_norm"]), normed(k, norms["k_norm"]), v], axis=-1)
    expected = attention(before.astype(np.float32), {})
    np.testing.assert_allclose(attention(qkv, norms), expected, rtol=2e-5, atol=2e-5)


def test_a_norm_weight_of_another_size_is_refused() -> None:
    wrong = {"q_norm": np.ones(H * S, np.float32), "k_norm": np.ones(S + 2, np.float32)}
    with pytest.raises(BundleError, match=r'layers.0.attn needs 64 or 32 values in "k_norm", which has 34'):
        attention(np.ones((1, (H + 2 * G) * S), np.float32), wrong)


def linear(matrix: GpuMatrix, given: Mapping[str, Array], **more: Array) -> Array:
    """Return the result of a QuantLinear node for x [rows, columns] and the inputs in `more`."""
    names = ("x", "weights", "norm", "residual", "bias")
    names = names[: max(i + 1 for i, name in enumerate(names) if name in {**given, **more})]
    inputs = tuple(name if name in {**given, **more} else "" for name in names)
    attrs = {**matrix_attrs(matrix), "activation": "f32", "activations": "float", "output": "f32", "epsilon": 1e-5}
    values = {"x": Value("f32", matrix.columns), "logits": Value("f32", matrix.outputs)}
    if "residual" in more:
        values["residual"] = Value("f32", matrix.outputs)
    weights = {name: data for name, data in {**given, **more}.items() if name not in values}
    program = program_of(Node("QuantLinear", "layers.0.qkv", inputs, ("logits",), attrs), values, weights)
    return run(program, Step(1, len(given["x"])), {**given, **more}, matrix.outputs)


def test_a_bias_is_the_fifth_input_of_a_matmul() -> None:
    rng = np.random.default_rng(3)
    matrix = GpuMatrix(GpuKind("f32"), 40, 64, 64)
    numbers = random_numbers(rng, matrix)
    given = {"x": rng.standard_normal((3, 64)).astype(np.float32), "weights": pack(matrix, [numbers])}
    bias, residual = (rng.standard_normal(size).astype(np.float32) for size in (40, (3, 40)))
    plain = linear(matrix, given)
    np.testing.assert_array_equal(linear(matrix, given, bias=bias), plain + bias)
    np.testing.assert_array_equal(linear(matrix, given, bias=bias, residual=residual), plain + bias + residual)


def test_a_bias_that_does_not_fit_is_refused() -> None:
    matrix = GpuMatrix(GpuKind("f32"), 40, 64, 64)
    given = {"x": np.ones((1, 64), np.float32), "weights": np.zeros(matrix.nbytes, np.uint8)}
    with pytest.raises(BundleError, match=r'layers.0.qkv needs 40 values in "bias", which has 64'):
        linear(matrix, given, bias=np.ones(64, np.float32))
    with pytest.raises(BundleError, match=r"layers.0.qkv adds a bias to a SwiGLU matmul"):
        linear(replace(matrix, swiglu=True), given, bias=np.ones(20, np.float32))


def norm_node(x: Array, kind: str = "f32", result: str = "f32", **more: Array) -> Array:
    """Return the result of an RMSNorm node for x, whose bits are of type `kind`."""
    width = x.shape[-1]
    node = Node("RMSNorm", "layers.0.after", ("x", *more), ("logits",), {"epsilon": 0.25})
    values = {"x": Value(kind, width), "logits": Value(result, width)}
    if "residual" in more:
        values["residual"] = Value("f32", width)
    weights = {name: data for name, data in more.items() if name not in values}
    return run(program_of(node, values, weights), Step(1, len(x)), {"x": x, **more}, width)


def test_a_norm_takes_the_type_of_its_value() -> None:
    rng = np.random.default_rng(8)
    x = rng.standard_normal((3, 64)).astype(np.float16).astype(np.float32)
    weight, residual = (rng.standard_normal(size).astype(np.float32) for size in (64, (3, 64)))
    exact = x.astype(np.float64) / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 0.25) * weight
    found = norm_node(x, weight=weight)
    np.testing.assert_allclose(found, exact, rtol=1e-6)
    np.testing.assert_array_equal(norm_node(x.astype(np.float16), "f16", weight=weight), found)
    np.testing.assert_array_equal(norm_node(x, weight=weight, residual=residual), found + residual)


def test_a_norm_that_does_not_fit_is_refused() -> None:
    x, weight = np.ones((1, 64), np.float32), np.ones(64, np.float32)
    with pytest.raises(BundleError, match=r'layers.0.after needs 64 values in "weight", which has 32'):
        norm_node(x, weight=weight[:32])
    with pytest.raises(BundleError, match=r'layers.0.after needs float32 in "logits"'):
        norm_node(x, result="bf16", weight=weight)
    with pytest.raises(BundleError, match=r"layers.0.after norms 63 columns, expected an even number"):
        norm_node(x[:, :63], weight=weight[:63])
