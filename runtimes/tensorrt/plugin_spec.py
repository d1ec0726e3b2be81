"""Nodes of our operators as plugins: names, and the one field that a graph and an engine hold.

libedgelm_plugins.so writes and reads the field (csrc/cuda/tensorrt/plugin_spec.h); here it is read to list the plugins
of an engine without TensorRT.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgelm.errors import EdgeLMError
from edgelm.runtimes.cuda import planning

PREFIX = "EdgeLM"
"""Prefix of plugin names. TensorRT's parser reserves names such as GroupQueryAttention, whatever their domain."""
NAMESPACE = "edgelm"
FIELD = "spec"
MARK = "edgelm_plugin=2\n"
"""The first line of the field; engines are searched for it."""
END = "\n\n"
"""The end of the field."""


def plugin_text(fields: Mapping[str, planning.Field]) -> str:
    """Return the field of a plugin with these lines: op, name, present, results, and the node's attributes.

    Raises:
        BundleError: there is no plugin for the operator, or the node lacks an input.
    """
    return planning.call("plugin_text", fields).decode()


@dataclass(frozen=True)
class PluginSpec:
    """A plugin of an engine.

    Attributes:
        op: operator of the domain `edgelm`.
        name: the node's label, e.g. "layers.3.attn".
        fields: all lines of the field but the first, by name.
    """

    op: str
    name: str
    fields: Mapping[str, str]

    @classmethod
    def from_text(cls, text: str) -> PluginSpec:
        """Parse a field.

        Raises:
            EdgeLMError: it is not a plugin's field.
        """
        lines = [line.partition("=") for line in text.removeprefix(MARK).split("\n") if line]
        fields = {name: value for name, equals, value in lines if equals}
        if not text.startswith(MARK) or len(fields) != len(lines) or not {"op", "name"} <= fields.keys():
            raise EdgeLMError("a plugin of this engine is damaged: build the engine again with `edgelm build BUNDLE`")
        return cls(fields["op"], fields["name"], fields)
