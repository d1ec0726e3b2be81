"""Build the router probe: a MoE of a few kilobytes with a known result, to check how a device routes.

Some execution providers renormalise the routing weights of the chosen experts whatever `normalize_routing_weights`
says. OLMoE's eight weights sum to 0.2 to 0.97, so such a provider's results are wrong by a factor. The probe has the
operator, attributes and layout of the bundle's MoE layers.
"""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from edgelm.export.graph.onnx_builder import MICROSOFT, GraphBuilder
from edgelm.export.graph.portable import ELEMENT
from edgelm.runtimes.onnxruntime.router_probe import EXPECTED, FOUND, RENORMALISED

EXPERTS, TOKENS, WIDTH = 8, 4, 128
_ATTRIBUTES = (
    "k", "activation_type", "swiglu_fusion", "activation_alpha", "activation_beta", "normalize_routing_weights",
    "expert_weight_bits", "block_size", "quant_type", "weights_prepacked",
)  # fmt: skip


def router_probe(model: onnx.ModelProto, dtype: str, experts_per_token: int) -> onnx.ModelProto | None:
    """Return the probe for the MoE layers of `model`, whose activations are `dtype`; None if it has no MoE.

    The probe has no inputs. Its outputs, all float32 [tokens, width], are the provider's result, the right result, and
    the result of renormalising.
    """
    node = next((node for node in model.graph.node if node.op_type in ("MoE", "QMoE")), None)
    if node is None:
        return None
    attributes = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
    kept = {name: attributes[name] for name in _ATTRIBUTES if name in attributes}
    kept["k"] = min(experts_per_token, EXPERTS // 2)
    random = np.random.default_rng(7)
    x = random.standard_normal((TOKENS, WIDTH)).astype(np.float32)
    # The weights of the chosen experts sum to well below 1, and no two logits are close.
    order = np.stack([random.permutation(EXPERTS) for _ in range(TOKENS)])
    logits: NDArray[np.float32] = order.astype(np.float32) * np.float32(0.25)
    gate_up = random.integers(-7, 8, (EXPERTS, 2 * WIDTH, WIDTH))
    down = random.integers(-7, 8, (EXPERTS, WIDTH, WIDTH))
    scale = np.float32(1 / 64)
    values = [matrix.astype(np.float32) * scale for matrix in (gate_up, down)]
    graph = GraphBuilder()

    def weight(name: str, value: NDArray[np.float32]) -> str:
        """Add a float32 constant and a cast to the activations' type; return the name of the cast."""
        return graph.node("Cast", [graph.constant(f"{name}.float32", value)], name, to=ELEMENT[dtype])

    if node.op_type == "MoE":
        weights = [weight(f"fc{i + 1}", value) for i, value in enumerate(values)]
        inputs = ["x", "router", weights[0], "", weights[1]]
    else:
        inputs = ["x", "router"]
        bits, block = int(kept.get("expert_weight_bits", 4)), int(kept["block_size"])
        for i, codes in enumerate((gate_up, down)):
            graph.constant(f"fc{i + 1}", _packed(codes, bits))
            scales = np.full((*codes.shape[:2], WIDTH // min(block, WIDTH)), scale, np.float32)
            inputs += [f"fc{i + 1}", weight(f"scales{i + 1}", scales), ""]
        kept["block_size"] = min(block, WIDTH)
        if len(node.input) > 14 and node.input[14]:
            inputs += [""] * (14 - len(inputs)) + [weight("router_weights", _softmax(logits))]
    weight("x", x)
    weight("router", logits)
    right = _moe(x, logits, values, int(kept["k"]), renormalise=bool(kept["normalize_routing_weights"]))
    wrong = _moe(x, logits, values, int(kept["k"]), renormalise=not kept["normalize_routing_weights"])
    graph.node(node.op_type, inputs, "y", MICROSOFT, **kept)
    graph.node("Cast", ["y"], FOUND, to=TensorProto.FLOAT)
    for name, value in ((EXPECTED, right), (RENORMALISED, wrong)):
        graph.node("Identity", [graph.constant(f"{name}.value", value)], name)
    for name in (FOUND, EXPECTED, RENORMALISED):
        graph.output(name, TensorProto.FLOAT, [TOKENS, WIDTH])
    return graph.model("router probe")


def _packed(codes: NDArray[np.int64], bits: int) -> NDArray[np.uint8]:
    unsigned = (codes + (1 << (bits - 1))).astype(np.uint8)
    return unsigned if bits == 8 else unsigned[..., 0::2] | (unsigned[..., 1::2] << np.uint8(4))


def _softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities: NDArray[np.float32] = raised / raised.sum(axis=1, keepdims=True)
    return probabilities


def _moe(
    x: NDArray[np.float32], logits: NDArray[np.float32], values: list[NDArray[np.float32]], k: int, *, renormalise: bool
) -> NDArray[np.float32]:
    probabilities, (gate_up, down) = _softmax(logits), values
    result = np.zeros_like(x)
    for token, row in enumerate(probabilities):
        chosen = np.argsort(-row, kind="stable")[:k]
        total = row[chosen].sum() if renormalise else np.float32(1)
        for expert in chosen:
            both = gate_up[expert] @ x[token]
            gate, up = both[0::2], both[1::2]
            result[token] += row[expert] / total * (down[expert] @ (gate / (1 + np.exp(-gate)) * up))
    return result
