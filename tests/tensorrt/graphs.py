"""Small graphs in our operators with random bytes for weights: what engines are made of does not depend on values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

D, H, G, S, E, V, C = 64, 4, 2, 16, 8, 96, 128


def small_graph(folder: Path, *, layers: int = 2, mixture: bool = True, kind: str = "bf16") -> onnx.ModelProto:
    """A decoder of `layers` layers, its weights in folder/weights.bin."""
    data = bytearray()
    initializers: list[TensorProto] = []
    rng = np.random.default_rng(1)

    def weight(name: str, dims: list[int], dtype: int = TensorProto.UINT8) -> str:
        size = int(np.prod(dims)) * {TensorProto.UINT8: 1, TensorProto.FLOAT: 4}[dtype]
        tensor = TensorProto(name=name, data_type=dtype, data_location=TensorProto.EXTERNAL)
        tensor.dims.extend(dims)
        data.extend(bytes(-len(data) % 4096))
        for key, value in (("location", "weights.bin"), ("offset", len(data)), ("length", size)):
            tensor.external_data.add(key=key, value=str(value))
        data.extend(rng.bytes(size))
        initializers.append(tensor)
        return name

    nodes: list[onnx.NodeProto] = []

    def add(op: str, inputs: list[str], outputs: list[str], label: str, **attrs: object) -> str:
        made = helper.make_node(op, inputs, outputs, domain="edgelm", **attrs)
        made.name = f"{outputs[0]}/{op}"
        made.attribute.append(helper.make_attribute("name", label))
        nodes.append(made)
        return outputs[0]

    cos, sin = (weight(name, [C, S // 2], TensorProto.FLOAT) for name in ("cos", "sin"))
    x = add("QuantEmbedding", ["input_ids", weight("table", [V * D * 2])], ["hidden.0"], "embed", columns=D, kind=kind)
    width = (H + 2 * G) * S
    for i in range(layers):
        norm = weight(f"norm.{i}", [D], TensorProto.FLOAT)
        qkv = add(
            "QuantLinear", [x, weight(f"qkv.{i}", [width * D * 2]), norm], [f"layers.{i}.qkv"], f"layers.{i}.qkv",
            rows=width, columns=D, output="bf16", kind=kind, epsilon=1e-5,
        )  # fmt: skip
        out = add(
            "GroupQueryAttention",
            [qkv, f"past_key_values.{i}.key", f"past_key_values.{i}.value", "past_lengths", cos, sin],
            [f"layers.{i}.out", f"present.{i}.key", f"present.{i}.value"], f"layers.{i}.attn",
            num_heads=H, kv_num_heads=G, head_size=S, epsilon=1e-5,
        )  # fmt: skip
        x = add(
            "QuantLinear", [out, weight(f"o.{i}", [D * D * 2]), "", x], [f"layers.{i}.sum"], f"layers.{i}.o",
            rows=D, columns=D, output="f32", kind=kind, epsilon=1e-5,
        )  # fmt: skip
        if mixture:
            gate_up, down = weight(f"gate_up.{i}", [E * 64 * D * 2]), weight(f"down.{i}", [E * 32 * D * 2])
            router = weight(f"router.{i}", [E, D], TensorProto.FLOAT)
            x = add(
                "SparseMoE", [x, router, gate_up, down, norm], [f"hidden.{i + 1}"], f"layers.{i}.moe",
                k=2, normalize=0, kind=kind, epsilon=1e-5,
            )  # fmt: skip
        else:
            hidden = add(
                "QuantLinear", [x, weight(f"gate_up.{i}", [64 * D * 2]), norm], [f"layers.{i}.product"],
                f"layers.{i}.gate_up", rows=64, columns=D, output="bf16", kind=kind, swiglu=1, epsilon=1e-5,
            )  # fmt: skip
            x = add(
                "QuantLinear", [hidden, weight(f"down.{i}", [32 * D * 2]), "", x], [f"hidden.{i + 1}"],
                f"layers.{i}.down", rows=D, columns=32, output="f32", kind=kind, epsilon=1e-5,
            )  # fmt: skip
    last = add("LastToken", [x], ["last"], "last")
    add(
        "QuantLinear", [last, "table", weight("final_norm", [D], TensorProto.FLOAT)], ["logits"], "head",
        rows=V, columns=D, output="f32", kind=kind, epsilon=1e-5,
    )  # fmt: skip
    cache = ["batch", G, "capacity", 2 * S]
    inputs = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT32, ["batch", "tokens"]),
        helper.make_tensor_value_info("past_lengths", TensorProto.INT32, ["batch"]),
    ]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 1, V])]
    for i in range(layers):
        for which in ("key", "value"):
            inputs.append(helper.make_tensor_value_info(f"past_key_values.{i}.{which}", TensorProto.UINT8, cache))
            outputs.append(helper.make_tensor_value_info(f"present.{i}.{which}", TensorProto.UINT8, cache))
    (folder / "weights.bin").write_bytes(bytes(data))
    graph = helper.make_graph(nodes, "small", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("edgelm", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)
