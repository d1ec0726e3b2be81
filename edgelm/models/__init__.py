"""The reference models, one file each, and the registry that finds a checkpoint's.

Importing this needs no torch; the files themselves do, and are imported when asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from edgelm.errors import UnsupportedConfigError


@dataclass(frozen=True)
class Family:
    """One supported model family: where its file is and what its classes are called.

    Attributes:
        name: "olmoe" or "llama", as bundles record it.
        architecture: what `architectures[0]` of a config.json says.
        model_type: what `model_type` says; used only when `architectures` is absent.
        prefix: of the class names in the family's file.
        file: the module in this package.
    """

    name: str
    architecture: str
    model_type: str
    prefix: str
    file: str

    def _attribute(self, name: str) -> Any:
        return getattr(importlib.import_module(f"edgelm.models.{self.file}"), name)

    @property
    def config_class(self) -> Any:
        """Frozen dataclass with `from_dict(config_json)`."""
        return self._attribute(f"{self.prefix}Config")

    @property
    def module_class(self) -> Any:
        """The whole model as a torch module: `Module(config)`, `load_weights(read)`, `forward(ids, cache, trace)`."""
        return self._attribute(self.prefix)

    @property
    def tensor_shapes(self) -> Callable[[Any], dict[str, tuple[int, ...]]]:
        """Function from a config to the names and shapes of the tensors on disk."""
        function: Callable[[Any], dict[str, tuple[int, ...]]] = self._attribute("tensor_shapes")
        return function

    @property
    def layer_from_disk(self) -> Callable[..., Any]:
        """Function (config, index, read) to one layer as a torch module with weights read by `read(name)`."""
        function: Callable[..., Any] = self._attribute("layer_from_disk")
        return function

    @property
    def norm_class(self) -> Any:
        """The model's RMSNorm module: `RMSNorm(size, eps)` with one `weight`."""
        return self._attribute("RMSNorm")


FAMILIES = (
    Family("olmoe", "OlmoeForCausalLM", "olmoe", "Olmoe", "olmoe"),
    Family("llama", "LlamaForCausalLM", "llama", "Fox", "fox"),
)

FORMER_NAMES = {"fox": "llama"}
"""What older bundles call a family."""


def family(config_json: Mapping[str, Any]) -> Family:
    """Find the family of a config.json by `architectures[0]`, or by `model_type` where that is absent.

    Raises:
        UnsupportedConfigError: the architecture is unknown.
    """
    architectures = config_json.get("architectures") or []
    if architectures:
        wanted, field = architectures[0], "architecture"
    else:
        wanted, field = config_json.get("model_type"), "model_type"
    for candidate in FAMILIES:
        if getattr(candidate, field) == wanted:
            return candidate
    known = ", ".join(getattr(candidate, field) for candidate in FAMILIES)
    raise UnsupportedConfigError(f"config.json: {field} {wanted!r} is not supported; EdgeLM knows {known}")
