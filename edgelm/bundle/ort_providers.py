"""Describe what each ONNX Runtime execution provider requires of a portable graph.

The facts about the CUDA provider were read from its sources and kernel registry (ONNX Runtime 1.31.1):

- GroupQueryAttention and QMoE exist in float16 and bfloat16 only.
- QMoE takes the softmax over all experts and ignores input 14. Its integer kernels need columns in multiples of 64 and
  groups of 32, 64 or 128. They expect prepacked weights; `weights_prepacked=0` declares the plain layout.
- GatherBlockQuantized indexes zero points by the block's number in the whole table. It reads them wrongly if a row
  ends within a byte of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from edgelm.bundle.activations import FLOAT32
from edgelm.errors import ExportError
from edgelm.quant.scheme import AnyScheme, Scheme

SOME_EXPERTS_FLOAT = (
    "stays float in this recipe, which quantises other experts of its layer: the experts of a layer are one operator, "
    "so quantise all of them or none"
)
"""Why one expert that stays float is refused."""


@dataclass(frozen=True)
class Provider:
    """Requirements of one execution provider.

    Attributes:
        title: Name in messages.
        computes_in: Types that activations, caches and scales may have, the preferred one first.
        router_weights: Whether QMoE must be fed the routing weights (input 14), as it renormalises otherwise.
        rounds_activations: Whether matmuls with integer weights can round activations to int8.
        instead: What to do for types that it has no operators for, such as "export with --ops native".
        blocks: Group sizes that it has quantised kernels for.
        expert_attributes: Additional attributes of QMoE.
        expert_tile: The columns of quantised experts must be multiples of this.
        whole_zero_rows: Whether the zero points of a row of a quantised table must fill whole bytes.
        session: Name and options of the provider for `genai_config.json`; None for the default provider.
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
        """Return the activations' type in a graph whose float matrices are stored as `storage`."""
        return storage if storage in self.computes_in else self.computes_in[0]

    def float_dtype(self, asked: str, checkpoint: str, *, quantises: bool) -> str:
        """Return the type in which float matrices are stored; see `edgelm.export.plan.Target.float_dtype`.

        Raises:
            ExportError: This provider cannot compute with the type asked for.
        """
        if "float32" in self.computes_in:
            return checkpoint if asked == "auto" else asked
        if asked == "auto":
            # Scales of quantised weights are float16. bfloat16 would round them again.
            return self.computes_in[0] if quantises or checkpoint not in self.computes_in else checkpoint
        if asked not in self.computes_in:
            raise ExportError(
                f"{self.title} does not support grouped-query attention in {asked}: export with --dtype "
                f"{' or '.join(self.computes_in)}, or with --target cpu"
            )
        return asked

    def largest_block(self) -> int:
        """Return the largest supported group. A larger one is stored as several groups with equal scales."""
        return max(self.blocks)

    def scheme_problem(self, scheme: AnyScheme | None) -> str | None:
        """Return why ONNX Runtime's own operators have no weights of a scheme (None: float), or None if they do."""
        if isinstance(scheme, Scheme) and scheme.bits in (4, 8):
            return None
        return (
            f"is {'float' if scheme is None else scheme.name} in this recipe, but ONNX Runtime's own operators support "
            f"only int4 and int8: {self.instead}, or choose another recipe"
        )

    def table_problem(self, groups: int, bits: int) -> str | None:
        """Return why a quantised table with zero points of `bits` for `groups` groups per row fails, or None."""
        if not self.whole_zero_rows or groups * bits % 8 == 0:
            return None
        return (
            f"has {groups} groups per row with zero points of {bits} bits, which {self.title} computes wrongly: give "
            "it a symmetric scheme in the recipe"
        )

    def expert_activations_problem(self, kind: str, bits: int) -> str | None:
        """Return why quantised experts of `bits` cannot have activations of a kind, or None."""
        if not self.rounds_activations or kind != FLOAT32 or bits != 8:
            return None
        return (
            "has float activations in this recipe, but ONNX Runtime's MoE operator always rounds the inputs of 8-bit "
            "experts to int8: export with --ops native, or leave activations out of the recipe"
        )

    def expert_problem(self, block: int, columns: int) -> str | None:
        """Return why groups of `block` or rows of `columns` weights are not supported in quantised experts, or None."""
        if block not in self.blocks:
            return (
                f"has groups of {block} weights, but {self.title} supports experts with groups of "
                f"{', '.join(map(str, self.blocks))}: choose another scheme in the recipe, such as int4-g32-sym"
            )
        if columns % self.expert_tile:
            return (
                f"has rows of {columns} weights, but {self.title} needs multiples of {self.expert_tile} in "
                "quantised experts: keep them in float in the recipe, or export with --target cpu"
            )
        return None


CPU = Provider(
    title="ONNX Runtime's CPU provider",
    computes_in=("float32",),
    router_weights=True,
    rounds_activations=True,
    instead="export with --ops native",
    # ONNX Runtime up to 1.27 reads larger groups wrongly without an error; 1.28 to 1.31 refuse them.
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
    # TF32 would reduce the router's float32 to 10 bits of mantissa.
    session=("cuda", {"use_tf32": "0", "enable_cuda_graph": "0"}),
)
