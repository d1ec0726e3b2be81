"""Small programs of our operators with random bytes as weights: building an engine does not depend on values."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgelm.bundle import ModelInfo
from edgelm.bundle.gpu_layout import GpuKind, GpuMatrix
from edgelm.runtimes.cuda.program import Attribute, Node, Program, Value, Weight, matrix_attrs

D, H, G, S, E, F, V, C = 128, 4, 2, 32, 8, 64, 96, 128
WEIGHTS = "weights.bin"


def info(layers: int, *, moe: bool = True) -> ModelInfo:
    return ModelInfo(
        family="olmoe" if moe else "fox", name="small", hidden_size=D, num_layers=layers, num_heads=H,
        num_kv_heads=G, head_dim=S, vocab_size=V, context_length=C, tied=True, num_experts=E if moe else 0,
        experts_per_token=2 if moe else 0,
    )  # fmt: skip


class SmallProgram:
    """A decoder of a few layers as a `program`, with its weights in folder/weights.bin.

    An MoE model has QK-norm over all heads; with `per_head` every model has it per head. `biased` adds a bias to
    queries, keys and values, `after` adds a norm after attention.
    """

    def __init__(
        self, folder: Path, layers: int = 2, *, moe: bool = True, kind: str = "bf16", activation: str = "bf16",
        kv: str = "float16", activations: str = "float", per_head: bool = False,
        biased: bool = False, after: bool = False,
    ) -> None:  # fmt: skip
        self.kind, self.activation, self.activations = GpuKind(kind), activation, activations
        self._data = bytearray()
        self._rng = np.random.default_rng(1)
        self._nodes: list[Node] = []
        self._values: dict[str, Value] = {}
        self._weights: dict[str, Weight] = {}
        table = self._blob("embed", V, D)
        cos, sin = (self._floats(name, C, S // 2) for name in ("cos", "sin"))
        x = self._add("QuantEmbedding", "embed", ["input_ids", "embed"], [("hidden.0", "f32", D)], matrix_attrs(table))
        for i in range(layers):
            norm = self._floats(f"norm.{i}", D)
            width = (H + 2 * G) * S
            bias = self._floats(f"bias.{i}", width) if biased else ""
            qkv = self._linear(f"layers.{i}.attn.qkv", x, width, D, norm=norm, bias=bias)
            caches = [f"past_key_values.{i}.{which}" for which in ("key", "value")]
            sizes = (("q", S if per_head else H * S), ("k", S if per_head else G * S)) if moe or per_head else ()
            norms = [self._floats(f"{which}_norm.{i}", size) for which, size in sizes]
            attended = self._add(
                "GroupQueryAttention", f"layers.{i}.attn", [qkv, *caches, "past_lengths", cos, sin, *norms],
                [(f"layers.{i}.attn.out", activation, H * S)],
                {"num_heads": H, "kv_num_heads": G, "head_size": S, "activation": activation, "kv": kv,
                 "epsilon": 1e-5, "clip": 0.0},
                [f"present.{i}.{which}" for which in ("key", "value")],
            )  # fmt: skip
            if after:
                y = self._linear(f"layers.{i}.attn_o", attended, D, H * S)
                inputs = [y, self._floats(f"after.{i}", D), x]
                x = self._add("RMSNorm", f"layers.{i}.after", inputs, [(f"attended.{i}", "f32", D)], {"epsilon": 1e-5})
            else:
                x = self._linear(f"layers.{i}.attn_sum", attended, D, H * S, residual=x)
            x = self._moe(i, x, norm) if moe else self._mlp(i, x, norm)
        last = self._add("LastToken", "head_input", [x], [("head_input", "f32", D)], {})
        self._linear("logits", last, V, D, norm=self._floats("final_norm", D), weights="embed")
        (folder / WEIGHTS).write_bytes(self._data)
        self.program = Program(tuple(self._nodes), self._values, self._weights)
        self.info = info(layers, moe=moe)

    def _moe(self, i: int, x: str, norm: str) -> str:
        gate_up = self._blob(f"layers.{i}.moe.gate_up", 2 * F, D, swiglu=True, count=E)
        down = self._blob(f"layers.{i}.moe.down", D, F, count=E)
        attrs = {
            **matrix_attrs(gate_up, "gate_up_"), **matrix_attrs(down, "down_"), "k": 2, "normalize": 0,
            "activation": self.activation, "activations": self.activations, "epsilon": 1e-5,
        }  # fmt: skip
        inputs = [x, self._floats(f"router.{i}", E, D), f"layers.{i}.moe.gate_up", f"layers.{i}.moe.down", norm]
        outputs = [(f"hidden.{i + 1}", "f32", D), (f"router_logits.{i}", "f32", E)]
        return self._add("SparseMoE", f"layers.{i}.moe", inputs, outputs, attrs)

    def _mlp(self, i: int, x: str, norm: str) -> str:
        activated = self._linear(f"layers.{i}.mlp.gate_up", x, 2 * F, D, norm=norm, swiglu=True)
        return self._linear(f"hidden.{i + 1}", activated, D, F, residual=x)

    def _linear(
        self, out: str, x: str, rows: int, columns: int, *, norm: str = "", residual: str = "", swiglu: bool = False,
        weights: str = "", bias: str = "",
    ) -> str:  # fmt: skip
        name = weights or f"{out}.weight"
        matrix = GpuMatrix(self.kind, rows, columns, columns, swiglu=swiglu)
        if not weights:
            self._blob(name, rows, columns, swiglu=swiglu)
        output = "f32" if residual or out == "logits" else self.activation
        attrs = {
            **matrix_attrs(matrix), "activation": self.activation, "activations": self.activations, "output": output,
            "epsilon": 1e-5,
        }  # fmt: skip
        return self._add("QuantLinear", name, [x, name, norm, residual, bias], [(out, output, matrix.outputs)], attrs)

    def _add(
        self, op: str, name: str, inputs: list[str], outputs: list[tuple[str, str, int]], attrs: dict[str, Attribute],
        caches: list[str] | None = None,
    ) -> str:  # fmt: skip
        while not inputs[-1]:
            inputs.pop()
        self._values |= {out: Value(kind, width) for out, kind, width in outputs}
        names = (*(out for out, _, _ in outputs), *(caches or []))
        self._nodes.append(Node(op, name, tuple(inputs), names, attrs))
        return outputs[0][0]

    def _blob(self, name: str, rows: int, columns: int, *, swiglu: bool = False, count: int = 1) -> GpuMatrix:
        matrix = GpuMatrix(self.kind, rows, columns, columns, swiglu=swiglu, count=count)
        place = self._place(matrix.nbytes)
        self._weights[name] = Weight("uint8", (matrix.nbytes,), place, matrix.nbytes)
        size = matrix.kind.scale_bytes
        if size:  # TensorRT needs positive scales
            ones = np.ones(count * matrix.scales_stride // size, np.float16 if size == 2 else np.float32).tobytes()
            self._data[place + matrix.scales_offset : place + matrix.scales_offset + len(ones)] = ones
        return matrix

    def _floats(self, name: str, *dims: int) -> str:
        size = 4 * int(np.prod(dims))
        self._weights[name] = Weight("f32", dims, self._place(size), size)
        return name

    def _place(self, size: int) -> int:
        self._data.extend(bytes(-len(self._data) % 4096))
        offset = len(self._data)
        self._data.extend(self._rng.bytes(size))
        return offset
