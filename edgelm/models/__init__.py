"""Registry of the supported models. Each model is one file in this package.

A model file has `spec(config_json)`, which returns the `edgelm.models.spec.Decoder` of a config.json, and `KEYS`, the
fields of config.json that it reads. No other code knows a model's name. Importing this package needs no torch.
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
    """A supported family of models.

    Attributes:
        name: name of its file in this package; bundles record it.
        architecture: value of `architectures[0]` in config.json.
        title: its name in errors.
    """

    name: str
    architecture: str
    title: str

    @property
    def model_type(self) -> str:
        """Value of `model_type` in config.json."""
        return self.name

    @property
    def keys(self) -> frozenset[str]:
        """The fields of config.json that it reads, apart from those of RoPE."""
        return cast("frozenset[str]", importlib.import_module(f"edgelm.models.{self.name}").KEYS)

    def spec(self, config_json: Mapping[str, Any]) -> Decoder:
        """Return the spec of the model that a config.json describes.

        Raises:
            UnsupportedConfigError: a field that changes the arithmetic is not implemented, or a field is unknown.
            CheckpointError: a field is missing or invalid.
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
"""Names of families in older bundles."""


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
    """Return the spec of the model that a config.json describes. Raises as `family` and `Family.spec`."""
    return family(config_json).spec(config_json)
