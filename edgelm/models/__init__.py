"""The models, one file each, and the registry that finds a checkpoint's.

A model file has `spec(config_json)`, which gives the `edgelm.models.spec.Decoder` of a config.json, and `KEYS`, the
fields of config.json that it reads. Nothing else knows a model's name. Importing this needs no torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from edgelm.errors import UnsupportedConfigError

if TYPE_CHECKING:
    from edgelm.models.spec import Decoder


@dataclass(frozen=True)
class Family:
    """One supported family of models.

    Attributes:
        name: of its file in this package, as bundles record it.
        architecture: what `architectures[0]` of a config.json says.
        title: what errors call it.
    """

    name: str
    architecture: str
    title: str

    @property
    def model_type(self) -> str:
        """What `model_type` of a config.json says."""
        return self.name

    @property
    def keys(self) -> frozenset[str]:
        """The fields of config.json that it reads, besides those about RoPE."""
        return cast("frozenset[str]", importlib.import_module(f"edgelm.models.{self.name}").KEYS)

    def spec(self, config_json: Mapping[str, Any]) -> Decoder:
        """The decoder that a config.json describes.

        Raises:
            UnsupportedConfigError: a field changes the arithmetic and is not implemented, or is unknown.
            CheckpointError: a field is missing or impossible.
        """
        from edgelm.models.unsupported_fields import check_fields

        check_fields(config_json, self.title, self.keys)
        return cast("Decoder", importlib.import_module(f"edgelm.models.{self.name}").spec(config_json))


FAMILIES = (
    Family("olmoe", "OlmoeForCausalLM", "OLMoE"),
    Family("llama", "LlamaForCausalLM", "Llama"),
    Family("mistral", "MistralForCausalLM", "Mistral"),
    Family("mixtral", "MixtralForCausalLM", "Mixtral"),
    Family("qwen2", "Qwen2ForCausalLM", "Qwen2"),
    Family("qwen3", "Qwen3ForCausalLM", "Qwen3"),
    Family("qwen3_moe", "Qwen3MoeForCausalLM", "Qwen3-MoE"),
    Family("olmo2", "Olmo2ForCausalLM", "OLMo-2"),
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


def decoder(config_json: Mapping[str, Any]) -> Decoder:
    """The decoder that a config.json describes, whatever its family. Raises as `family` and `Family.spec`."""
    return family(config_json).spec(config_json)
