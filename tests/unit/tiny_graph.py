"""Build a bundle with a tiny random decoder in the graph form that runtimes expect, without the exporter.

So the tests of runtimes do not depend on the exporter, and know the weights.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgelm.bundle import (
    Bundle,
    FileInfo,
    GraphInfo,
    Manifest,
    ModelInfo,
    RecipeInfo,
    SourceInfo,
    TensorEntry,
    TokenIds,
    sha256_of,
)


@dataclasses.dataclass(frozen=True)
class Shape:
    vocab: int = 97
    hidden: int = 32
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    context: int = 64


def weights(shape: Shape, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Return random weights by name, [in, out]."""
    rng = np.random.default_rng(seed)
    width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim

    def matrix(*size: int) -> NDArray[np.float32]:
        return (rng.standard_normal(size) / np.sqrt(size[0])).astype(np.float32)

    tensors = {"embed": rng.standard_normal((shape.vocab, shape.hidden)).astype(np.float32)}
    for i in range(shape.layers):
        tensors |= {
            f"{i}.norm": np.ones(shape.hidden, np.float32),
            f"{i}.q": matrix(shape.hidden, width),
            f"{i}.k": matrix(shape.hidden, kv_width),
            f"{i}.v": matrix(shape.hidden, kv_width),
            f"{i}.o": matrix(width, shape.hidden),
            f"{i}.up": matrix(shape.hidden, 2 * shape.hidden),
            f"{i}.down": matrix(2 * shape.hidden, shape.hidden),
        }
    return tensors | {"norm": np.ones(shape.hidden, np.float32), "head": matrix(shape.hidden, shape.vocab) * 4}


def _rope_caches(shape: Shape) -> dict[str, NDArray[np.float32]]:
    frequencies = 10000.0 ** (-np.arange(0, shape.head_dim, 2) / shape.head_dim)
    angles = np.outer(np.arange(shape.context), frequencies)
    return {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}


def graph(shape: Shape, *, debug: bool, seed: int = 0) -> onnx.ModelProto:
    """Return the graph of the decoder; `debug` adds the outputs `hidden.{i}`."""
    nodes: list[onnx.NodeProto] = []

    def node(op: str, inputs: list[str], outputs: list[str], domain: str = "", **attributes: object) -> str:
        nodes.append(helper.make_node(op, inputs, outputs, domain=domain, **attributes))
        return outputs[0]

    def norm(x: str, weight: str, out: str) -> str:
        return node("SimplifiedLayerNormalization", [x, weight], [out], axis=-1, epsilon=1e-5)

    constants: dict[str, NDArray[np.generic]] = {
        "axis1": np.array([1], np.int64),
        "far": np.array([np.iinfo(np.int64).max], np.int64),
        "one32": np.array(1, np.int32),
    }
    node("ReduceSum", ["mask32", "axis1"], ["lengths"], keepdims=0)
    nodes.insert(0, helper.make_node("Cast", ["attention_mask"], ["mask32"], to=TensorProto.INT32))
    node("Sub", ["lengths", "one32"], ["seqlens_k"])
    node("Shape", ["attention_mask"], ["mask_length"], start=1, end=2)
    node("Squeeze", ["mask_length"], ["mask_scalar"])
    node("Cast", ["mask_scalar"], ["total"], to=TensorProto.INT32)
    x = node("Gather", ["embed", "input_ids"], ["hidden.0"])
    for i in range(shape.layers):
        normed = norm(x, f"{i}.norm", f"{i}.normed")
        q, k, v = (node("MatMul", [normed, f"{i}.{part}"], [f"{i}.{part}_out"]) for part in "qkv")
        attended = node(
            "GroupQueryAttention",
            [q, k, v, f"past_key_values.{i}.key", f"past_key_values.{i}.value", "seqlens_k", "total", "cos", "sin"],
            [f"{i}.attended", f"present.{i}.key", f"present.{i}.value"],
            domain="com.microsoft",
            num_heads=shape.heads,
            kv_num_heads=shape.kv_heads,
            do_rotary=1,
        )
        x = node("Add", [x, node("MatMul", [attended, f"{i}.o"], [f"{i}.o_out"])], [f"{i}.mid"])
        up = node("Tanh", [node("MatMul", [x, f"{i}.up"], [f"{i}.up_out"])], [f"{i}.act"])
        x = node("Add", [x, node("MatMul", [up, f"{i}.down"], [f"{i}.down_out"])], [f"hidden.{i + 1}"])
    kept = node("Slice", [x, "logits_start", "far", "axis1"], ["kept"])
    node("MatMul", [norm(kept, "norm", "final"), "head"], ["logits"])

    cache = ["batch", shape.kv_heads, "max_length", shape.head_dim]
    inputs = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "tokens"]),
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "total"]),
    ]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "kept", shape.vocab])]
    for i in range(shape.layers):
        for part in ("key", "value"):
            inputs.append(helper.make_tensor_value_info(f"past_key_values.{i}.{part}", TensorProto.FLOAT, cache))
            outputs.append(helper.make_tensor_value_info(f"present.{i}.{part}", TensorProto.FLOAT, cache))
    if debug:
        outputs += [
            helper.make_tensor_value_info(f"hidden.{i}", TensorProto.FLOAT, ["batch", "tokens", shape.hidden])
            for i in range(shape.layers + 1)
        ]
    initializers = {**constants, **weights(shape, seed), **_rope_caches(shape)}
    # An input with a default value must be both an input and an initializer.
    inputs.append(helper.make_tensor_value_info("logits_start", TensorProto.INT64, [1]))
    initializers["logits_start"] = np.array([-1], np.int64)
    return helper.make_model(
        helper.make_graph(
            nodes,
            "tiny",
            inputs,
            outputs,
            [numpy_helper.from_array(value, name) for name, value in initializers.items()],
        ),
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)],
        ir_version=10,
    )


def write_tiny_bundle(
    path: Path, shape: Shape | None = None, *, seed: int = 0, eos_ids: tuple[int, ...] = ()
) -> Bundle:
    """Write the bundle (graph, debug graph, manifest; no tokenizer, no parity pack) and open it."""
    shape = shape or Shape()
    path.mkdir(parents=True)
    onnx.save(graph(shape, debug=False, seed=seed), path / "model.onnx")
    onnx.save(graph(shape, debug=True, seed=seed), path / "model.debug.onnx")
    (path / "model.onnx.data").write_bytes(b"\0" * 64)
    (path / "config.json").write_text(json.dumps({"vocab_size": shape.vocab}), encoding="utf-8")
    return write_manifest(path, shape, eos_ids)


def write_manifest(path: Path, shape: Shape, eos_ids: tuple[int, ...]) -> Bundle:
    """Write a manifest that lists the files in the folder."""
    files = {p.name: FileInfo(p.stat().st_size, sha256_of(p)) for p in path.iterdir() if p.name != "manifest.json"}
    manifest = Manifest(
        model=ModelInfo(
            family="fox",
            name="tiny-graph",
            hidden_size=shape.hidden,
            num_layers=shape.layers,
            num_heads=shape.heads,
            num_kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            vocab_size=shape.vocab,
            context_length=shape.context,
            tied=False,
        ),
        target="cpu",
        ops="portable",
        dtype="float32",
        recipe=RecipeInfo("none", 'name = "none"\n'),
        graph=GraphInfo("model.onnx", "model.debug.onnx", "model.onnx.data"),
        tokens=TokenIds(bos_id=None, eos_ids=eos_ids, pad_id=None),
        source=SourceInfo("tiny-graph"),
        files=files,
        tensors=(TensorEntry("embed", 0, 64, 0x758D6336),),
        tools={},
        created="2026-01-01T00:00:00Z",
    )
    (path / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")
    return Bundle.open(path)


def write_tiny_model(
    path: Path, shape: Shape | None = None, *, seed: int = 0, eos_ids: tuple[int, ...] = (), gemma: bool = False
) -> Bundle:
    """`write_tiny_bundle` with a tokenizer and a chat template, so that `edgelm.load` can load it.

    The tokenizer is byte-level as OLMoE's. With `gemma` it is as Fox's, which prepends bos (2).
    """
    from edgelm.synth.tokenizer import write_gemma_tokenizer, write_olmoe_tokenizer

    shape = shape or Shape(vocab=512, context=256)
    write_tiny_bundle(path, shape, seed=seed)
    if gemma:
        write_gemma_tokenizer(path, shape.vocab)
    else:
        write_olmoe_tokenizer(path, shape.vocab, 2, renamed_eos=False)
    return write_manifest(path, shape, eos_ids)
