"""Export a checkpoint to a bundle.

`export_bundle` is the entry point. `graph` builds the graph of a model's spec, `packing` lays out the weights, and the
targets (`onnxruntime`, `tensorrt`) hold what differs from device to device.
"""

from __future__ import annotations

from edgelm.export.api import export_bundle
from edgelm.export.options import ExportOptions

__all__ = ["ExportOptions", "export_bundle"]
