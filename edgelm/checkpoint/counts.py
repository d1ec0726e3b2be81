"""Check of the counts in config.json against the files, before memory is used for layers that do not exist."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgelm.errors import CheckpointError
from edgelm.models.config_fields import shortened

_LAYER = re.compile(r"(.*?\blayers)\.(\d+)\.")
_EXPERT_FIELDS = ("num_experts", "num_local_experts")
_EXPERT = re.compile(r".*?\bexperts\.(\d+)\.")


def check_counts(config: Mapping[str, Any], names: Mapping[str, object], path: Path) -> None:
    """Check that the files hold as many layers and experts as config.json counts.

    Args:
        config: contents of config.json. Counts of a wrong type are skipped; the reader of the field refuses them.
        names: canonical names of the tensors.
        path: the folder, for errors.

    Raises:
        CheckpointError: the files hold fewer.
    """
    layers = {found[2] for name in names if (found := _LAYER.match(name)) is not None}
    experts = {found[1] for name in names if (found := _EXPERT.match(name)) is not None}
    held = {"num_hidden_layers": len(layers)}
    field_of_experts = next((field for field in _EXPERT_FIELDS if config.get(field) is not None), _EXPERT_FIELDS[0])
    if experts:
        held[field_of_experts] = len(experts)
    for field, count in held.items():
        asked = config.get(field)
        if isinstance(asked, int) and asked > max(count, 1):
            raise CheckpointError(
                f"{path / 'config.json'}: {field} is {shortened(asked)}, but the weight files hold "
                f"{count} {'layers' if field == 'num_hidden_layers' else 'experts per layer'}: config.json describes "
                "another model, or files are missing"
            )
    asked = [config.get("num_hidden_layers"), config.get(field_of_experts) or 1]
    if all(isinstance(count, int) for count in asked) and asked[0] * asked[1] > max(len(names), 1):
        raise CheckpointError(
            f"{path / 'config.json'}: num_hidden_layers {shortened(asked[0])} times {field_of_experts} "
            f"{shortened(asked[1])} are more than the {len(names)} tensors in the weight files: config.json "
            "describes another model"
        )
