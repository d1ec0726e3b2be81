"""Check that an operator set supports every feature of a model.

The check runs before the first weight is read and lists everything that is missing. The graph builders check the
recipe, because they know the weight formats.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from edgelm.errors import ExportError
from edgelm.models.spec import Decoder, MoE


@dataclass(frozen=True)
class Capabilities:
    """Features that an operator set supports.

    Attributes:
        title: Name of the operator in messages.
        head_multiple: Head sizes must be multiples of this.
        instead: Options to export with if a feature is missing, such as "--ops portable".
        head_sizes: The supported head sizes; None for every multiple.
        windows: Whether sliding-window attention is supported.
    """

    title: str
    head_multiple: int
    instead: str
    head_sizes: tuple[int, ...] | None = None
    windows: bool = False


NATIVE = Capabilities("our attention on the CPU", 2, "--ops portable")
PORTABLE = Capabilities(
    # With RoPE it takes only multiples of 16 (tried: ONNX Runtime 1.18 to 1.32, sizes 1 to 1024).
    "ONNX Runtime's GroupQueryAttention",
    16,
    "--target cpu --ops native, which takes all even sizes",
    windows=True,
)
GPU = Capabilities("our attention on GPUs", 2, "--target cpu", head_sizes=(32, 64, 128))


def missing(decoder: Decoder, has: Capabilities) -> Iterator[str]:
    """Yield a message for each feature of a decoder that an operator set does not support, naming its config field."""
    shapes = {(part.heads, part.kv_heads, part.head_dim) for part in decoder.attention}
    if len(shapes) > 1:
        yield (
            "config.json gives layers different attention shapes (num_attention_heads, num_key_value_heads, head_dim): "
            "all layers must share one, as the KV cache has one shape"
        )
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
            f"config.json has sliding_window {window}, which {has.title} does not support: export with --target cpu "
            f"--ops portable, or set max_position_embeddings to {window} (in shorter contexts the window has no effect)"
        )
    for block in decoder.blocks:
        if isinstance(block.part, MoE) and (block.before is None or block.after is not None):
            yield (
                f"layer {block.layer} has a MoE with a norm after it or without one before it: no operator set "
                "supports that"
            )
            break


def check(decoder: Decoder, has: Capabilities) -> None:
    """Refuse a decoder that needs features the operator set does not support.

    Raises:
        ExportError: Lists every missing feature.
    """
    found = list(missing(decoder, has))
    if found:
        raise ExportError("; ".join(found))
