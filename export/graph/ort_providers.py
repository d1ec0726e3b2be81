"""What ONNX Runtime's execution providers want of a portable graph: graph building asks this, never for the target.

What is said of the CUDA provider was read from its sources and kernel registry (ONNX Runtime 1.31.1):
GroupQueryAttention and QMoE exist there in float16 and bfloat16 only; QMoE takes the softmax over all experts and never
looks at input 14; its integer kernels want tiles of 64 columns, groups of 32, 64 or 128, and, unless told otherwise,
weights in a layout of its own (`weights_prepacked=0` says that they are the plain ones); GatherBlockQuantized finds
zero points by the number of the block in the whole table, so rows that end within a byte of them are read wrongly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from edgelm.errors import ExportError


@dataclass(frozen=True)
class Provider:
    """One execution provider.

    Attributes:
        title: for messages.
        computes_in: types that activations, caches and scales may have, the preferred one first.
        router_weights: whether the MoE has to be fed its weights (input 14) to leave them as they are.
        rounds_activations: whether matmuls with integers round their other operand to int8.
        expert_attributes: attributes of QMoE besides those that all have.
        expert_tile: what the columns of quantised experts have to be multiples of.
        blocks: the groups that it has quantised kernels for.
        whole_zero_rows: whether a row of a quantised table has to fill its bytes of zero points.
        instead: what to export with for types that it has no operators for.
        session: ONNX Runtime's name of the provider and its options, for `genai_config.json`; None: the default.
    """

    title: str
    computes_in: tuple[str, ...]
    router_weights: bool
    rounds_activations: bool
    instead: str
    blocks: tuple[int, ...]
    expert_attributes: Mapping[str, int] = field(default_factory=dict)
    expert_tile: int = 1
    whole_zero_rows: bool = False
    session: tuple[str, Mapping[str, str]] | None = None

    def compute_type(self, storage: str) -> str:
        """What a graph computes in whose float matrices are stored as `storage`."""
        return storage if storage in self.computes_in else self.computes_in[0]

    def float_dtype(self, asked: str, checkpoint: str, *, quantises: bool) -> str:
        """How float matrices are stored: what was asked for, "auto" being the checkpoint's type where that will do.

        Raises:
            ExportError: this provider cannot compute with what was asked for.
        """
        if "float32" in self.computes_in:
            return checkpoint if asked == "auto" else asked
        if asked == "auto":
            # Scales of integers are float16: as bfloat16 they would be rounded once more.
            return self.computes_in[0] if quantises or checkpoint not in self.computes_in else checkpoint
        if asked not in self.computes_in:
            raise ExportError(
                f"{self.title} has no grouped-query attention in {asked}: export with --dtype "
                f"{' or '.join(self.computes_in)}, or with --target cpu"
            )
        return asked

    def largest_block(self) -> int:
        """The largest group it has kernels for; larger ones are stored as several with equal scales."""
        return max(self.blocks)

    def expert_problem(self, block: int, columns: int) -> str | None:
        """Why it cannot compute quantised experts with these groups and rows of `columns` weights; None if it can."""
        if block not in self.blocks:
            return (
                f"has groups of {block} weights, {self.title} has experts with groups of "
                f"{', '.join(map(str, self.blocks))}: choose another scheme in the recipe, such as int4-g32-sym"
            )
        if columns % self.expert_tile:
            return (
                f"has rows of {columns} weights, {self.title} wants multiples of {self.expert_tile} in "
                "quantised experts: keep them in float in the recipe, or export with --target cpu"
            )
        return None


CPU = Provider(
    title="ONNX Runtime's CPU provider",
    computes_in=("float32",),
    router_weights=True,
    rounds_activations=True,
    instead="export with --ops native",
    # Larger ones were read wrongly without a word up to 1.27 and are refused from 1.28 to 1.31.
    blocks=(16, 32, 64, 128, 256),
)
CUDA = Provider(
    title="ONNX Runtime's CUDA provider",
    computes_in=("float16", "bfloat16"),
    router_weights=False,
    rounds_activations=False,
    instead="export with --target tensorrt",
    expert_attributes={"weights_prepacked": 0},
    expert_tile=64,
    blocks=(32, 64, 128),
    whole_zero_rows=True,
    # TF32 would leave the router 10 bits of its float32.
    session=("cuda", {"use_tf32": "0", "enable_cuda_graph": "0"}),
)
