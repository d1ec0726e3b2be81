"""Describe in one line how a bundle's matrices are quantised."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from edgelm.errors import EdgeLMError

if TYPE_CHECKING:
    from edgelm.bundle import Bundle
    from edgelm.models.spec import Decoder


def schemes_line(bundle: Bundle) -> str | None:
    """Return the schemes of the matrices by role, and the bits per weight; None if config or recipe cannot be read.

    The roles of the scheme with the most weights are "the rest". A role with several schemes names them all.
    """
    from edgelm.checkpoint import MAX_CONFIG_BYTES
    from edgelm.checkpoint.jsonfile import read_json_object
    from edgelm.models import decoder
    from edgelm.quant.recipe import FLOAT, Recipe

    try:
        model = decoder(read_json_object(bundle.file("config.json"), MAX_CONFIG_BYTES))
        recipe = Recipe.from_toml(bundle.manifest.recipe.toml).for_model(model)
    except EdgeLMError:  # of another version
        return None
    weights: Counter[str] = Counter()
    schemes: dict[str, set[str]] = {}
    for name, matrix in model.matrices.items():
        scheme = recipe.match(name)
        label = FLOAT if scheme is None else scheme.name
        weights[label] += matrix.rows * matrix.columns
        schemes.setdefault(matrix.role, set()).add(label)
    usual = max(weights, key=lambda label: weights[label])
    roles: dict[str, list[str]] = {}
    for role, found in schemes.items():
        roles.setdefault(" and ".join(sorted(found)), []).append(role)
    parts = [f"{', '.join(named)} {label}" for label, named in roles.items() if label != usual]
    if usual in roles:
        parts.append(f"the rest {usual}" if parts else f"all {usual}")
    bits = _bits_per_weight(bundle, model)
    return "; ".join([*parts, *([] if bits is None else [f"{bits:.1f} bits per weight"])])


def _bits_per_weight(bundle: Bundle, model: Decoder) -> float | None:
    """Return the stored bits per weight of all matrices but routers, with scales and padding; None if not recorded."""
    counted = {name: matrix for name, matrix in model.matrices.items() if matrix.role != "router"}
    found: set[str] = set()
    size = 0
    for tensor in bundle.manifest.tensors:
        held = () if tensor.contents is None else tensor.contents.matrices
        if held and held[0] in counted:
            found.update(held)
            size += tensor.size
    weights = sum(matrix.rows * matrix.columns for name, matrix in counted.items() if name in found)
    return 8 * size / weights if weights else None
