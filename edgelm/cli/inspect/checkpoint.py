"""Describe a checkpoint of any architecture, and say whether `edgelm export` takes it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelm.errors import EdgeLMError

if TYPE_CHECKING:
    from edgelm.checkpoint import CheckpointFiles
    from edgelm.quant.source import WeightSource

_SHOWN = {
    "num_hidden_layers": "layers",
    "hidden_size": "hidden size",
    "vocab_size": "tokens in the vocabulary",
    "num_experts": "experts",
    "num_experts_per_tok": "experts chosen for a token",
}
"""Fields of config.json that are shown, with the words for them."""


def checkpoint_document(path: Path) -> dict[str, Any]:
    """Return config, sizes and data types of the checkpoint at `path`, and why `export` would refuse it.

    Only the headers of weights are read, except for tensors that must be compared. Values such as NaN are found by an
    export.

    Raises:
        CheckpointError: config.json or the weight files cannot be read.
    """
    from edgelm.checkpoint import CheckpointFiles

    with CheckpointFiles(path) as files:
        dtypes: dict[str, int] = {}
        for tensor in files.stored.values():
            dtypes[tensor.dtype] = dtypes.get(tensor.dtype, 0) + 1
        family, source, refused = _survey(files)
        quantized = files.config.get("quantization_config") is not None
        recipe = source.recipe if source is not None and quantized else None
        return {
            "kind": "checkpoint",
            "path": str(path),
            "config": files.config,
            "family": family,
            "tensors": len(files.stored),
            "dtypes": dtypes,
            "bytes": sum(tensor.nbytes for tensor in files.stored.values()),
            "quantized": quantized,
            "recipe": None if recipe is None else {"name": recipe.name, "toml": recipe.to_toml()},
            "input_scales": 0 if recipe is None or source is None else _input_scales(source),
            "exportable": not refused,
            "refused": refused,
        }


def _input_scales(source: WeightSource) -> int:
    return sum(source.input_scale(name) is not None for name in source.shapes)


def _survey(files: CheckpointFiles) -> tuple[str | None, WeightSource | None, list[str]]:
    """Return the family, the tensors if they can be opened, and every reason against an export."""
    from edgelm.checkpoint import Checkpoint
    from edgelm.preflight.subject import spec_of
    from edgelm.quant.source import WeightSource

    family, config, refused = spec_of(files.config)
    if family is None:
        return None, None, [_without_folder(reason, files) for reason in refused]
    source = None
    try:
        # Not closed: the command reads from it until it ends.
        source = WeightSource(Checkpoint(files.path))
        if config is not None:
            source.check_tensors(config.tensor_shapes)
    except EdgeLMError as error:
        refused.append(_said(error, files))
    refused += _tokenizer(files, None if config is None else config.vocab_size)
    return family, source, list(dict.fromkeys(_without_folder(reason, files) for reason in refused))


def _tokenizer(files: CheckpointFiles, rows: int | None) -> list[str]:
    """Return the reasons against the checkpoint's tokenizer."""
    from edgelm.tokenization.tokenizer import Tokenizer

    try:
        tokenizer = Tokenizer.from_folder(files.path)
    except EdgeLMError as error:
        return [_said(error, files)]
    if rows is not None and tokenizer.vocab_size > rows:
        return [f"the tokenizer has {tokenizer.vocab_size} tokens, the model's table only {rows} rows"]
    return []


def _said(error: EdgeLMError, files: CheckpointFiles) -> str:
    return _without_folder(str(error), files)


def _without_folder(reason: str, files: CheckpointFiles) -> str:
    """Return the message without the folder, which is printed once above."""
    return reason.removeprefix(str(files.path)).lstrip(":/ ")


def checkpoint_rows(document: Mapping[str, Any], *, verbose: bool = False) -> list[tuple[str, str]]:
    """Describe a checkpoint for people by its `checkpoint_document`, with `verbose` with all of its config."""
    from edgelm.sizes import format_size

    config, family = document["config"], document["family"]
    named = config.get("architectures") or [config.get("model_type", "unknown")]
    architecture = named[0] if isinstance(named, list) else named
    rows = [
        ("checkpoint", str(document["path"])),
        ("architecture", f"{architecture} ({family})" if family else str(architecture)),
        (
            "model",
            ", ".join(f"{config[name]} {words}" for name, words in _SHOWN.items() if name in config) or "unknown",
        ),
        ("size", format_size(document["bytes"])),
        ("tensors", ", ".join(f"{count:,} {dtype}" for dtype, count in document["dtypes"].items()) or "none"),
    ]
    if document["quantized"]:
        quantization, recipe = config["quantization_config"], document["recipe"]
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        rows.append(("quantised", f"by {method}{', recipe ' + recipe['name'] if recipe else ''}"))
        if document["input_scales"]:
            rows.append(("", f"{document['input_scales']} matrices with a static scale of their inputs"))
    if verbose:
        rows += [(name, str(value)) for name, value in sorted(config.items())]
    if document["exportable"]:
        return [*rows, ("export", "supported")]
    return [*rows, ("export", "not supported"), *(("REFUSED", reason) for reason in document["refused"])]
