"""Write compressed-tensors checkpoints, "pack-quantized", for vLLM: the layout that `compressed_tensors` here reads.

compressed-tensors 0.20.1 (`compressors/pack_quantized/{base,helpers}.py`) packs codes as a dense stream of bits, along
K for weights and along N for zero points, from the lowest bit of little-endian words; the last word of a row is padded
with zeros. A row of a `QuantTensor` is the same stream, so its bytes are copied.

Scales are float32, although ours are float16: compressed-tensors multiplies in the type of the scales, and code times
scale is exact in float32 (4 or 8 bits times 11), but not in float16. vLLM converts scales to the model's type, so
bfloat16 rounds them to 8 bits and float16 keeps them.

The limits are those of vLLM 0.32: Marlin's groups, whose zero points have 4 bits; q, k and v computed as one matmul,
gate and up as another, all experts of a layer as one (`compressed_tensors.py`, `utils/marlin_utils.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgelm.checkpoint.writer import TensorSpec
from edgelm.errors import RecipeError
from edgelm.models.spec import EMBEDDING, HEAD
from edgelm.quant.formats.layout import Block, Layout, Planned
from edgelm.quant.primitives import pack
from edgelm.quant.recipe import AUTO, FLOAT, Recipe, of_role
from edgelm.quant.scheme import AnyScheme, Scheme
from edgelm.quant.tensor import QuantTensor

if TYPE_CHECKING:
    from edgelm.models.spec import Decoder, Matrix

METHOD = "compressed-tensors"
FORMAT = "pack-quantized"
BITS = (4, 8)
GROUPS = (128, 64, 32)
"""Values per scale that Marlin, vLLM's kernel for GPUs, has besides whole rows."""

_KEPT_FLOAT = (EMBEDDING, "router", HEAD)
_FLOAT_CACHES = (AUTO, "float16", "float32")
_WORD_BITS = 32
_ATTENTION = ("q", "k", "v")
_FEED_FORWARD = ("gate", "up")


class CompressedTensorsLayout(Layout):
    """Layout of `compressed_tensors.CompressedTensors` with the format "pack-quantized"."""

    row_unit = _WORD_BITS  # the zero points of 32 rows fill whole words, with any number of bits

    def adapted(self, recipe: Recipe, decoder: Decoder) -> Recipe:
        """Return the preset int4 with groups of 128 and int8 with a scale per row, the usual schemes in vLLM.

        Embedding, head and router stay float. If 128 does not divide every row, int4 takes the largest of `GROUPS` that
        does, or a scale per row. Other recipes are returned as they are.
        """
        if not recipe.is_preset or recipe.name not in ("int4", "int8"):
            return recipe
        rows = [matrix.columns for matrix in decoder.matrices.values() if matrix.role not in _KEPT_FLOAT]
        group = next((group for group in GROUPS if not any(columns % group for columns in rows)), None)
        scheme = Scheme(4, group) if recipe.name == "int4" else Scheme(8, None)
        return Recipe(scheme.name.removesuffix("-sym"), scheme, tuple(of_role(role, None) for role in _KEPT_FLOAT))

    def check(self, weights: Planned) -> None:
        """See `Layout.check`."""
        recipe, matrices = weights.recipe, weights.checkpoint.decoder.matrices
        if recipe.kv not in _FLOAT_CACHES:
            raise RecipeError(
                f'the recipe "{recipe.name}" has kv = "{recipe.kv}", but {METHOD} checkpoints have no type of the KV '
                "cache: remove the key, and give vLLM --kv-cache-dtype"
            )
        for name, shape in weights.shapes.items():
            scheme = weights.scheme(name)
            if scheme is None:
                continue
            matrix = matrices.get(name)
            if matrix is None or matrix.role in _KEPT_FLOAT:
                what = "no matrix of the model" if matrix is None else f"the {matrix.role}"
                raise _refused(recipe, name, scheme, f"{what}, which stays float there", 'give it scheme = "float"')
            _check_scheme(recipe, name, scheme, shape[1])
            kind = recipe.activations_for(name)
            if kind not in (AUTO, FLOAT):
                why = f'{FORMAT} has float activations, not "{kind}"'
                raise _refused(recipe, name, scheme, why, "remove `activations`")
        for together, why in _computed_together(matrices.values()):
            first, *others = together
            for other in others:
                found, wanted = weights.scheme(other.name), weights.scheme(first.name)
                if found != wanted:
                    raise RecipeError(
                        f'the recipe "{recipe.name}" gives {first.name} {_label(wanted)} and {other.name} '
                        f"{_label(found)}, but {why} as one in vLLM: give them one scheme, with a group that divides "
                        "the rows of all"
                    )

    def parts(self, name: str, shape: tuple[int, int], scheme: AnyScheme) -> dict[str, TensorSpec]:
        """See `Layout.parts`."""
        (rows, columns), stem = shape, _stem(name)
        groups = scheme.groups(columns)
        specs = {
            f"{stem}.weight_packed": TensorSpec("I32", (rows, _words(columns, scheme))),
            f"{stem}.weight_scale": TensorSpec("F32", (rows, groups)),
            f"{stem}.weight_shape": TensorSpec("I64", (2,)),
        }
        if scheme.has_zeros:
            specs[f"{stem}.weight_zero_point"] = TensorSpec("I32", (_words(rows, scheme), groups))
        return specs

    def blocks(self, name: str, shape: tuple[int, int], start: int, found: QuantTensor) -> Iterator[Block]:
        """See `Layout.blocks`."""
        stem, bits = _stem(name), found.scheme.bits
        if start == 0:
            yield f"{stem}.weight_shape", 0, np.array(shape, np.int64)
        yield f"{stem}.weight_packed", start, _in_words(found.codes)
        yield f"{stem}.weight_scale", start, found.scales.astype(np.float32)
        if found.zeros is not None:
            along_rows = _in_words(pack(np.ascontiguousarray(found.zeros.T), bits))
            yield f"{stem}.weight_zero_point", start * bits // _WORD_BITS, np.ascontiguousarray(along_rows.T)

    def settings(self, weights: Planned) -> dict[str, object]:
        """See `Layout.settings`. The keys are those that compressed-tensors writes."""
        matrices = weights.checkpoint.decoder.matrices
        schemes = {name: weights.scheme(name) for name in matrices if name in weights.shapes}
        kinds = list(dict.fromkeys(scheme for scheme in schemes.values() if scheme is not None))
        modules = {_stem(name): scheme for name, scheme in schemes.items()}
        groups = {
            f"group_{index}": {
                "format": FORMAT,
                "input_activations": None,
                "output_activations": None,
                # "Linear" names every module, so it can stand for one group only.
                "targets": ["Linear"] if len(kinds) == 1 else _targets(modules, scheme),
                "weights": _weights(scheme),
            }
            for index, scheme in enumerate(kinds)
        }
        ignored = [module for module, scheme in modules.items() if scheme is None]
        head = "lm_head"  # a tied head has no tensor, but it is a module of type Linear
        return {
            "config_groups": groups,
            "format": FORMAT,
            "global_compression_ratio": None,
            "ignore": ignored if head in ignored else [*ignored, head],
            "kv_cache_scheme": None,
            "quant_method": METHOD,
            "quantization_status": "compressed",
        }


def _check_scheme(recipe: Recipe, name: str, scheme: AnyScheme, columns: int) -> None:
    """Check that vLLM has a scheme for rows of `columns` values."""
    advice = f"choose among int4-g128-sym (or g64, g32, row; asym) and int8-row-sym (or g128, g64, g32) for {name}"
    if not isinstance(scheme, Scheme) or scheme.bits not in BITS:
        raise _refused(recipe, name, scheme, f"{FORMAT} has 4 and 8 bits in vLLM", advice)
    if not scheme.symmetric and scheme.bits != 4:
        raise _refused(recipe, name, scheme, "zero points have 4 bits in vLLM", advice)
    if scheme.group is not None and scheme.group not in GROUPS:
        raise _refused(recipe, name, scheme, "vLLM has groups of 32, 64 and 128, and rows", advice)
    unit = scheme.group or _WORD_BITS // scheme.bits
    if columns % unit:
        raise _refused(recipe, name, scheme, f"its rows of {columns} are no multiple of {unit}", "keep it float")
    if not name.endswith(".weight"):
        raise _refused(recipe, name, scheme, 'its name does not end in ".weight"', "keep it float")


def _refused(recipe: Recipe, name: str, scheme: AnyScheme, why: str, advice: str) -> RecipeError:
    return RecipeError(
        f'the recipe "{recipe.name}" gives {name} {scheme.name}, which {METHOD} cannot hold: {why}. To go on, {advice}'
    )


def _label(scheme: AnyScheme | None) -> str:
    return FLOAT if scheme is None else scheme.name


def _computed_together(matrices: Iterable[Matrix]) -> Iterator[tuple[list[Matrix], str]]:
    """Yield the matrices that vLLM computes as one, and a description of them."""
    found: dict[tuple[int | None, str], list[Matrix]] = {}
    for matrix in matrices:
        if matrix.expert is not None:
            found.setdefault((matrix.layer, "the experts of a layer are computed"), []).append(matrix)
        elif matrix.role in _ATTENTION:
            found.setdefault((matrix.layer, "q, k and v are computed"), []).append(matrix)
        elif matrix.role in _FEED_FORWARD:
            found.setdefault((matrix.layer, "gate and up are computed"), []).append(matrix)
    for (_, why), together in found.items():
        yield together, why


def _targets(modules: Mapping[str, AnyScheme | None], scheme: AnyScheme) -> list[str]:
    """Return patterns and names that match exactly the modules with `scheme`.

    Modules whose names differ only in numbers share a pattern if they agree. All experts agree (`check`), so a layer's
    share one: vLLM asks for their projections by names that a model may not have.
    """
    patterns: dict[str, list[str]] = {}
    for module in modules:
        patterns.setdefault(_pattern(module, r"\.\d+(?=\.|$)"), []).append(module)
    found: dict[str, None] = {}
    for pattern, alike in patterns.items():
        kinds = {modules[module] for module in alike}
        if kinds == {scheme}:
            found[pattern] = None
        elif scheme in kinds:
            found |= {_single(module): None for module in alike if modules[module] == scheme}
    return list(found)


def _pattern(module: str, number: str) -> str:
    parent, experts, _ = module.partition(".experts.")
    stem = re.sub(number, "<n>", parent if experts else module)
    escaped = re.escape(stem).replace("<n>", r"\.\d+")
    return f"re:{escaped}{re.escape(experts)}.*" if experts else f"re:{escaped}$"


def _single(module: str) -> str:
    parent, experts, _ = module.partition(".experts.")
    return f"re:{re.escape(parent + experts)}.*" if experts else module


def _weights(scheme: AnyScheme) -> dict[str, object]:
    assert isinstance(scheme, Scheme)
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if scheme.group is None else "group",
        "group_size": scheme.group,
        "dynamic": False,
    }


def _stem(name: str) -> str:
    return name.removesuffix(".weight")


def _words(count: int, scheme: AnyScheme) -> int:
    return -(-count * scheme.bits // _WORD_BITS)


def _in_words(packed: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Return rows of bytes as words, int32 [n, ceil(bytes / 4)], the last one padded with zeros."""
    spare = -packed.shape[1] % 4
    return np.ascontiguousarray(np.pad(packed, ((0, 0), (0, spare)))).view("<i4").astype(np.int32, copy=False)
