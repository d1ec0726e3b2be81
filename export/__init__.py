"""Checkpoint and recipe to bundle.

`export_bundle` is the whole of it. `graph` interprets a model's spec, `packing` lays out its weights, and a target
(`onnxruntime`, `tensorrt`) says what a kind of device needs.
"""

from __future__ import annotations

from edgelm.export.api import export_bundle
from edgelm.export.options import ExportOptions

__all__ = ["ExportOptions", "export_bundle"]
