"""Quantised checkpoints: read those of other tools (GPTQ, AWQ, compressed-tensors, FP8), write ours and for vLLM.

The values are read exactly, without rounding again. Whatever EdgeLM's schemes cannot hold exactly is refused, with the
tensor's name and advice. A `Layout` writes them.
"""

from __future__ import annotations

from collections.abc import Mapping

from edgelm.errors import EdgeLMError
from edgelm.quant.formats import compressed_tensors_layout, edgelm
from edgelm.quant.formats.layout import Layout
from edgelm.quant.formats.reader import FORMATS, FormatWeights, format_of, recipe_of

__all__ = ["FORMATS", "LAYOUTS", "FormatWeights", "Layout", "format_of", "layout_of", "recipe_of"]

LAYOUTS: Mapping[str, Layout] = {
    edgelm.METHOD: edgelm.OWN,
    compressed_tensors_layout.METHOD: compressed_tensors_layout.CompressedTensorsLayout(),
}
"""How `quantize_checkpoint` can store a checkpoint, by the `quant_method` that config.json gets."""


def layout_of(name: str) -> Layout:
    """Return one of `LAYOUTS`.

    Raises:
        EdgeLMError: There is none of that name.
    """
    if name not in LAYOUTS:
        raise EdgeLMError(f"there is no checkpoint format {name!r} to write: choose {' or '.join(LAYOUTS)}")
    return LAYOUTS[name]
