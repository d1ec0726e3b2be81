"""Map the tensor names in checkpoint files to canonical names, in the way of transformers 5.

- A model saved without its head (`layers.0...`) or inside another one (`model.model.layers.0...`): the names become
  `model.layers.0...`.
- Stacked experts, `...mlp.experts.gate_up_proj` [E, 2F, D] and `down_proj` [E, D, F]: they become matrices of each
  expert, `...mlp.experts.{e}.gate_proj.weight` [F, D] and so on, which are slices of the same bytes.
- `lm_head.weight` of a tied model: omitted if it equals the embedding; used as the embedding where that is missing.
- `...rotary_emb.inv_freq`: omitted if it equals the frequencies that the config gives.
- float64 tensors are read as float32.

Prefixes that training tools add raise an error that names the tool: transformers cannot read those tensors either.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.checkpoint.safetensors import FLOAT_DTYPES, MAX_TENSORS, TensorInfo, as_float32
from edgelm.errors import CheckpointError
from edgelm.models.spec import Decoder
from edgelm.slices import slices

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

Read = Callable[[TensorInfo, "slice | None"], NDArray[Any]]
"""Function that reads a tensor, or some of its rows, as stored."""

_BLOCK_BYTES = 8 << 20
_ROOT = re.compile(r"(?:layers\.\d+|embed_tokens|norm)\.")  # modules inside `model.`
_STACKED = re.compile(r"(.+\.mlp\.experts)\.(gate_up_proj|down_proj)")
_PREFIXED = re.compile(r"((?:[\w-]+\.)*?)(?:(?:model\.)?(?:layers\.\d+|embed_tokens|norm)|lm_head)\.")
_TRAINING_TOOLS = {
    "_orig_mod": "torch.compile: save model._orig_mod",
    "module": "DistributedDataParallel or DeepSpeed: save model.module",
    "_fsdp_wrapped_module": "FSDP: save its full state dict",
    "_checkpoint_wrapped_module": "activation checkpointing: save the model without it",
    "base_model": "PEFT: save model.merge_and_unload()",
    "base_layer": "PEFT: save model.merge_and_unload()",
    "lora_A": "PEFT: save model.merge_and_unload()",
    "lora_B": "PEFT: save model.merge_and_unload()",
}
# Allowed relative error of a stored frequency by its type. Below 2**-14 float16 has an absolute step as well.
_FREQUENCY_ERROR = {"F64": 4e-6, "F32": 4e-6, "BF16": 2**-8, "F16": 2**-10}
_HALF_STEP = 2.0**-24


@dataclass(frozen=True)
class CanonicalTensors:
    """The tensors of a checkpoint under canonical names.

    Attributes:
        tensors: the tensors by canonical name, with their stored types.
        head: the head that a tied model stores in addition; it must equal the embedding.
        frequencies: stored rotary frequencies; they must equal those of the config.
    """

    tensors: dict[str, TensorInfo]
    head: TensorInfo | None = None
    frequencies: tuple[TensorInfo, ...] = ()


def canonical(stored: Mapping[str, TensorInfo], *, tied: bool) -> CanonicalTensors:
    """Give the tensors of a checkpoint their canonical names. Reads only the files' headers.

    Args:
        stored: tensors by their names in the files.
        tied: whether config.json ties the head to the embedding.

    Raises:
        CheckpointError: a name has a training tool's prefix, or two tensors have one canonical name.
    """
    tensors: dict[str, TensorInfo] = {}
    frequencies = []
    for info in stored.values():
        name = _with_model_prefix(info.name)
        if name.endswith("rotary_emb.inv_freq"):
            frequencies.append(info)
            continue
        for part in _experts(replace(info, name=name)):
            if part.name in tensors:
                raise CheckpointError(
                    f"{info.file}: {info.name!r} is a second tensor for {part.name!r}; save the checkpoint again"
                )
            tensors[part.name] = part
        if len(tensors) > 4 * MAX_TENSORS:
            raise CheckpointError(f"{info.file}: {info.name!r} has the shape {info.shape}: too many experts")
    _refuse_prefixes(tensors)
    head = None
    if tied and HEAD in tensors:
        if EMBEDDING in tensors:
            head = tensors.pop(HEAD)
        else:
            tensors = {(EMBEDDING if name == HEAD else name): info for name, info in tensors.items()}
            tensors[EMBEDDING] = replace(tensors[EMBEDDING], name=EMBEDDING)
    return CanonicalTensors(tensors, head, tuple(frequencies))


def as_read(info: TensorInfo) -> TensorInfo:
    """Return the tensor's entry with the type that `Checkpoint` gives it: float32 for float64. `nbytes` stays."""
    return replace(info, dtype="F32") if info.dtype == "F64" else info


def _with_model_prefix(name: str) -> str:
    if _ROOT.match(name):
        return f"model.{name}"
    rest = name.removeprefix("model.")
    if rest != name and (rest.startswith("lm_head.") or (rest.startswith("model.") and _ROOT.match(rest[6:]))):
        return rest
    return name


def _experts(info: TensorInfo) -> Iterator[TensorInfo]:
    """Yield the tensor itself; of stacked experts, the entries of each expert's matrices, which lie back to back."""
    found = _STACKED.fullmatch(info.name)
    stacked = found is not None and len(info.shape) == 3 and info.dtype in FLOAT_DTYPES and info.nbytes > 0
    matrices = ("gate_proj", "up_proj") if found and found[2] == "gate_up_proj" else ("down_proj",)
    if found is None or not stacked or info.shape[1] % len(matrices):
        yield info
        return
    experts, rows, columns = info.shape
    if experts > MAX_TENSORS:
        raise CheckpointError(f"{info.file}: {info.name!r} has the shape {info.shape}: too many experts")
    shape, nbytes = (rows // len(matrices), columns), info.nbytes // (experts * len(matrices))
    places = ((expert, matrix) for expert in range(experts) for matrix in matrices)
    for place, (expert, matrix) in enumerate(places):
        name = f"{found[1]}.{expert}.{matrix}.weight"
        yield replace(info, name=name, shape=shape, offset=info.offset + place * nbytes, nbytes=nbytes)


def _refuse_prefixes(tensors: Mapping[str, TensorInfo]) -> None:
    """Raise an error for names with a prefix or suffix of a training tool."""
    for name, info in tensors.items():
        tools = [part for part in name.split(".") if part in _TRAINING_TOOLS]
        found = _PREFIXED.match(name)
        prefix = found[1] if found is not None else ""
        if not tools and (not prefix or EMBEDDING in tensors):
            continue
        alike = [other for other in tensors if (other.startswith(prefix) if prefix else tools[0] in other.split("."))]
        what = f"the prefix {prefix!r}" if prefix else f"{tools[0]!r} in its name"
        left = f", left by {_TRAINING_TOOLS[tools[0]]}," if tools else ": save the language model alone,"
        raise CheckpointError(
            f"{info.file}: tensor {name!r} has {what} ({len(alike)} of {len(tensors)} have){left} or rename the tensors"
        )


def check_head(head: TensorInfo, embedding: TensorInfo, read: Read) -> None:
    """Check that the stored head of a tied model equals its embedding.

    Raises:
        CheckpointError: it does not; says by how much and where.
    """
    if head.shape != embedding.shape or not head.shape:
        raise CheckpointError(
            f"{head.file}: {head.name!r} {head.shape} and {embedding.name!r} {embedding.shape} differ in shape, but "
            "config.json ties them (tie_word_embeddings): set that to false if the head has weights of its own"
        )
    largest, place, count = 0.0, 0, 0
    columns = math.prod(head.shape[1:])
    for part in slices(head.shape[0], _BLOCK_BYTES // max(8 * columns, 1)):
        stored = (read(head, part), read(embedding, part))
        if head.dtype == embedding.dtype and np.array_equal(stored[0].view(np.uint8), stored[1].view(np.uint8)):
            continue
        values = [as_float32(array, info.dtype) for array, info in zip(stored, (head, embedding), strict=True)]
        with np.errstate(invalid="ignore"):
            apart = np.abs(values[0] - values[1]).reshape(-1)
        apart[np.isnan(apart)] = np.inf
        count += int(np.count_nonzero(apart))
        if apart.size and apart.max() > largest:
            largest, place = float(apart.max()), part.start * columns + int(apart.argmax())
    if count:
        index = ", ".join(str(int(i)) for i in np.unravel_index(place, head.shape))
        raise CheckpointError(
            f"{head.file}: {head.name!r} differs from {embedding.name!r} in {count} value(s), by {largest:.4g} at "
            f"[{index}], but config.json ties them (tie_word_embeddings): set that to false if the head has weights "
            "of its own, or remove the tensor"
        )


def check_frequencies(info: TensorInfo, decoder: Decoder, read: Read) -> None:
    """Check that stored rotary frequencies equal those of the spec up to the rounding of their type.

    Raises:
        CheckpointError: they do not; says by how much and where.
    """
    attention = decoder.attention[0]
    head_dim, rope = attention.head_dim, attention.rope
    if rope is None or info.dtype not in FLOAT_DTYPES or info.shape != (head_dim // 2,):
        raise CheckpointError(
            f"{info.file}: {info.name!r} is {info.dtype} {info.shape}, the rotary frequencies of heads of {head_dim} "
            f"are ({head_dim // 2},): config.json describes another model"
        )
    values = as_float32(read(info, None), info.dtype).astype(np.float64)
    expected = np.asarray(rope.inv_freq)
    allowed = _FREQUENCY_ERROR[info.dtype] * expected + (_HALF_STEP if info.dtype == "F16" else 0.0)
    wrong = ~(np.abs(values - expected) <= allowed)
    if wrong.any():
        with np.errstate(invalid="ignore"):
            apart = np.where(np.isfinite(values), np.abs(values - expected), np.inf)
        place = int(np.argmax(apart))
        raise CheckpointError(
            f"{info.file}: {info.name!r} differs from the frequencies that config.json gives by "
            f"{apart[place]:.4g} at [{place}] ({values[place]:.6g} for {expected[place]:.6g}): RoPE with stored "
            "frequencies is not implemented, and transformers ignores them; correct rope_theta or rope_scaling, or "
            "remove the tensor"
        )
