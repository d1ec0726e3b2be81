"""What each set of operators can compute of a decoder, and one check that lists all that is missing.

The check runs before the first weight is read. What a recipe asks for is checked by the graph builders, which know the
formats of weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from edgelm.errors import ExportError
from edgelm.models.spec import Decoder, MoE
from edgelm.runtimes.cuda.kernels.attention import HEAD_SIZES


@dataclass(frozen=True)
class Capabilities:
    """What a set of operators has.

    Attributes:
        title: for messages.
        head_multiple: what head sizes have to be multiples of.
        head_sizes: those that there are; None for any multiple.
        windows: attention to the last positions only.
        instead: what to export with in place of it.
    """

    title: str
    head_multiple: int
    instead: str
    head_sizes: tuple[int, ...] | None = None
    windows: bool = False


NATIVE = Capabilities("our attention on the CPU", 2, "--ops portable")
PORTABLE = Capabilities(
    # With rotary positions it takes multiples of 16 alone (tried: 1.18 to 1.32, sizes 1 to 1024).
    "ONNX Runtime's GroupQueryAttention",
    16,
    "--target cpu --ops native, which takes all even sizes",
    windows=True,
)
GPU = Capabilities("our attention on GPUs", 2, "--target cpu", head_sizes=HEAD_SIZES)


def missing(decoder: Decoder, has: Capabilities) -> Iterator[str]:
    """Every feature of a decoder that a set of operators does not have, by its field of config.json."""
    shapes = {(part.heads, part.kv_heads, part.head_dim) for part in decoder.attention}
    if len(shapes) > 1:
        yield "config.json has layers with different heads (num_attention_heads, head_dim): one cache holds them all"
    size = decoder.attention[0].head_dim
    if size % has.head_multiple or (has.head_sizes is not None and size not in has.head_sizes):
        taken = f"multiples of {has.head_multiple}"
        if has.head_sizes is not None:
            taken = f"heads of {', '.join(map(str, has.head_sizes))}"
        yield (
            f"config.json has heads of {size} (head_dim, or hidden_size / num_attention_heads), {has.title} takes "
            f"{taken}: export with {has.instead}"
        )
    windows = {part.window for part in decoder.attention if part.window is not None}
    if windows and not has.windows:
        window = min(windows)
        yield (
            f"config.json has sliding_window {window}, attention to the last positions only, which {has.title} does "
            f"not have: export with --target cpu --ops portable, or set max_position_embeddings to {window}, up to "
            "where it changes nothing"
        )
    for block in decoder.blocks:
        if isinstance(block.part, MoE) and (block.before is None or block.after is not None):
            yield f"layer {block.layer} has experts whose norm is not before them, which no operators have"
            break


def check(decoder: Decoder, has: Capabilities) -> None:
    """Refuse a decoder that needs more.

    Raises:
        ExportError: with everything that is missing.
    """
    found = list(missing(decoder, has))
    if found:
        raise ExportError("; ".join(found))
