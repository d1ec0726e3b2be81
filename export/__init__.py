"""Checkpoint and recipe to bundle.

`export_bundle` is the whole of it; `onnx_olmoe` and `onnx_fox` hold one family's graph each, `graph` and `weights` what
both are built from.
"""

from __future__ import annotations

from edgelm.export.api import export_bundle
from edgelm.export.options import ExportOptions

__all__ = ["ExportOptions", "export_bundle"]
