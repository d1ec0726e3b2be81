"""Build MoE layers from portable operators: ONNX Runtime's MoE and QMoE.

Facts behind the design, checked on the CPU with ONNX Runtime 1.31 (for CUDA see ort_providers.py):

- QMoE routes differently per execution provider. The CPU's takes the softmax over the *selected* experts only, so it
  always renormalises unless `router_weights` (input 14) is fed. CUDA's takes it over all experts and ignores input 14.
  Logits in `router_probs`, the full softmax in `router_weights` and `normalize_routing_weights=0` are right on both.
- The CPU's MoE and QMoE take gate and up interleaved row by row (`swiglu_fusion=1`), with one width and one block size.
- The router is always float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from numpy.typing import NDArray

from edgelm.bundle.activations import CPU, FLOAT32
from edgelm.bundle.ort_providers import SOME_EXPERTS_FLOAT
from edgelm.errors import ExportError
from edgelm.export.activations import rounded
from edgelm.export.graph.base import STORAGE, stored_as
from edgelm.export.graph.onnx_builder import MICROSOFT, int64
from edgelm.export.graph.portable import ACCURACY, PortableOps, QuantizedSlots
from edgelm.export.packing.contents import Held, array
from edgelm.export.packing.ort import BlockFormat, codes_in, interleave, zeros_in
from edgelm.export.packing.weights_file import Slot, SlotWriter
from edgelm.models.spec import MoE
from edgelm.progress import Advance
from edgelm.quant.source import WeightSource
from edgelm.quant.tensor import QuantTensor


class PortableMoE:
    """Adds MoE layers to the graph of `ops`."""

    def __init__(self, ops: PortableOps) -> None:
        self.ops = ops

    def router(self, x: str, name: str, experts: int, out: str, logits: str, layer: int) -> str:
        """Add the router of x [B, T, D]; its float32 result `logits` is [B * T, E]."""
        weight = self.ops.stored(self.ops.float_matrix(name, layer, "float32"))
        upcast = self.ops.cast(x, "float32", f"{out}.in")
        scores = self.ops.graph.node("FusedMatMul", [upcast, weight], out, MICROSOFT, transB=1)
        flat = self.ops.graph.constant("flat_tokens", int64(-1, experts))
        return self.ops.graph.node("Reshape", [scores, flat], logits)

    def _router_probs(self, logits: str, out: str) -> str:
        """Add the MoE operator's input `router_probs`, in the activations' type.

        If that type is not float32, the input is the log-probabilities instead of the logits. Their softmax is the
        same, and those of the most probable experts are close to 0, where a low-precision type is finest.
        """
        if self.ops.compute == "float32":
            return logits
        logarithm = self.ops.graph.node("LogSoftmax", [logits], f"{out}.log_probabilities", axis=-1)
        return self.ops.to_values(logarithm, f"{out}.router_logits")

    def _router_weights(self, logits: str, out: str) -> str:
        """Add the softmax over all experts, for providers that renormalise without it."""
        stem = f"{out}.router_weights"
        if self.ops.compute == "float32":
            return self.ops.graph.node("Softmax", [logits], stem, axis=-1)
        return self.ops.to_values(self.ops.graph.node("Softmax", [logits], f"{stem}.float32", axis=-1), stem)

    def experts(self, x: str, logits: str, part: MoE, out: str, layer: int) -> str:
        """Add a top-k MoE of SwiGLU experts.

        Args:
            x: Activations [B, T, D].
            logits: Router logits [B * T, E].
            part: The experts and how they are chosen.
            out: Name of the result [B, T, D]; also the stem of the weights' names.
            layer: Index of the layer.
        """
        names = [(expert.gate.name, expert.up.name, expert.down.name) for expert in part.experts]
        flat = [name for expert in names for name in expert]
        schemes = [self.ops.source.scheme(name) for name in flat]
        common: dict[str, Any] = {
            "k": part.k,
            "activation_type": "swiglu",
            "swiglu_fusion": 1,
            "normalize_routing_weights": int(part.normalize),
        }
        if all(scheme is None for scheme in schemes):
            fc1, fc2 = self._float_experts(names, out, layer)
            weights = [self.ops.as_computed(fc1), "", self.ops.as_computed(fc2)]
            inputs = [self._not_in_place(x, fc1.dims[2], out), self._router_probs(logits, out), *weights]
            return self.ops.graph.node("MoE", inputs, out, MICROSOFT, **common)
        if any(scheme is None for scheme in schemes):
            kept = next(name for name, scheme in zip(flat, schemes, strict=True) if scheme is None)
            self.ops.refuse(kept, SOME_EXPERTS_FLOAT)
            return out
        first, second = self._quantized_experts(names, out, layer)
        try:
            kind = CPU.of_experts(self.ops.source, flat, layer)
        except ExportError as error:
            self.ops.refuse("the recipe", str(error).removeprefix("the recipe "))
            return out
        problem = self.ops.provider.expert_activations_problem(kind, first.fmt.bits)
        if problem is not None:
            self.ops.refuse(flat[0], problem)
        for parts, matrix in ((slice(0, 2), first), (slice(2, 3), second)):
            some = [name for expert in names for name in expert[parts]]
            self.ops.rounded |= rounded(self.ops.source, some, kind, matrix.columns)
        weight = self.ops.graph.weight
        zeros = [weight(matrix.zeros) if matrix.zeros else "" for matrix in (first, second)]
        inputs = [x, self._router_probs(logits, out)]
        for matrix in (first, second):
            inputs += [weight(matrix.codes), self.ops.stored(matrix.scales), ""]
        inputs += ["", "", "", *zeros, ""]
        if self.ops.provider.router_weights and not part.normalize:
            inputs.append(self._router_weights(logits, out))
        return self.ops.graph.node(
            "QMoE", inputs, out, MICROSOFT, expert_weight_bits=first.fmt.bits, block_size=first.fmt.block,
            accuracy_level=self._expert_accuracy(kind, first.fmt.bits), **self.ops.provider.expert_attributes, **common,
        )  # fmt: skip

    def _expert_accuracy(self, kind: str, bits: int) -> int:
        """Return QMoE's attribute `accuracy_level`.

        QMoE's 8-bit kernel rounds to int8 in any case, and ONNX Runtime before 1.31 does not know the attribute, so it
        is left at its default there. For 4 bits it makes a layer of OLMoE 2.2 to 3.3 times as fast (docs/log.md).
        """
        return ACCURACY[FLOAT32] if bits == 8 else self.ops.accuracy(kind)

    def _not_in_place(self, x: str, hidden: int, out: str) -> str:
        """Add a reshape of x [B, T, D] that hides its number of tokens from shape inference.

        It works around a bug of the CPU's MoE in ONNX Runtime 1.31. If input and output have equal known shapes, the
        output reuses the input's buffer, and the operator reads what it has overwritten: errors of 20 % were measured.
        """
        shape = self.ops.graph.constant("same_tokens", int64(0, -1, hidden))
        return self.ops.graph.node("Reshape", [x, shape], f"{out}.in")

    def _expert_parts(self, names: Sequence[tuple[str, str, str]]) -> list[tuple[tuple[int, int, int], Held]]:
        """Return shape and matrices of all experts' gate and up, then those of all experts' down."""
        width, hidden = self.ops.source.shape(names[0][0])
        return [
            ((len(names), 2 * width, hidden), self.ops.held(*(name for expert in names for name in expert[:2]))),
            ((len(names), hidden, width), self.ops.held(*(down for _, _, down in names))),
        ]

    def _float_experts(self, names: Sequence[tuple[str, str, str]], stem: str, layer: int) -> tuple[Slot, Slot]:
        dtype = STORAGE[self.ops.dtype]
        (first, pairs), (second, downs) = self._expert_parts(names)
        fc1 = self.ops.plan.slot(f"{stem}.gate_up", first, dtype, layer, array(first, dtype, pairs, interleave=1))
        fc2 = self.ops.plan.slot(f"{stem}.down", second, dtype, layer, array(second, dtype, downs))

        def fill(source: WeightSource, writers: Sequence[SlotWriter], advance: Advance) -> None:
            for gate, up, down in names:
                rows = interleave(source.float32(gate), source.float32(up))
                writers[0].append(stored_as(rows, self.ops.dtype, gate))
                writers[1].append(stored_as(source.float32(down), self.ops.dtype, down))
                advance(sum(source.nbytes(name) for name in (gate, up, down)))

        self.ops.plan.job([fc1, fc2], fill)
        return fc1, fc2

    def _quantized_experts(
        self, names: Sequence[tuple[str, str, str]], stem: str, layer: int
    ) -> tuple[QuantizedSlots, QuantizedSlots]:
        # QMoE has one block size and one bit width for both matmuls, so the coarser format is stored as the finer one.
        fmt = self.ops.common_format([name for expert in names for name in expert])
        for name in (names[0][0], names[0][2]):
            problem = self.ops.provider.expert_problem(fmt.block, self.ops.source.shape(name)[1])
            if problem is not None:
                self.ops.refuse(name, problem)
        (first, pairs), (second, downs) = self._expert_parts(names)
        fc1 = self.ops.quantized_slots(f"{stem}.gate_up", first, fmt, layer, pairs, interleave=1)
        fc2 = self.ops.quantized_slots(f"{stem}.down", second, fmt, layer, downs)
        parts: list[Callable[[QuantTensor, BlockFormat], NDArray[Any]]] = [codes_in, self.ops.scales_in]
        if fmt.zeros:
            parts.append(zeros_in)

        def fill(source: WeightSource, writers: Sequence[SlotWriter], advance: Advance) -> None:
            for gate, up, down in names:
                tensors = [source.quantized(name) for name in (gate, up, down)]
                for part, first, second in zip(parts, writers[: len(parts)], writers[len(parts) :], strict=True):
                    first.append(interleave(part(tensors[0], fmt), part(tensors[1], fmt)))
                    second.append(part(tensors[2], fmt))
                advance(sum(source.nbytes(name) for name in (gate, up, down)))

        self.ops.plan.job(fc1.all + fc2.all, fill)
        return fc1, fc2
