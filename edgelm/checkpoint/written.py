"""Recognise checkpoints that EdgeLM wrote, by the list of files in them."""

from __future__ import annotations

import json
from pathlib import Path

from edgelm.checkpoint.jsonfile import read_json_object
from edgelm.errors import CheckpointError
from edgelm.output_paths import OutputKind, first_unlisted

FILE_LIST = "edgelm-files.json"
_FORMAT = "edgelm-checkpoint"


def _seal(folder: Path) -> None:
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    data = {"format": _FORMAT, "files": [*names, FILE_LIST]}
    (folder / FILE_LIST).write_text(
        json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n"
    )


def _unknown_content(folder: Path) -> str | None:
    try:
        data = read_json_object(folder / FILE_LIST)
    except CheckpointError:
        data = {}
    listed = data.get("files")
    if data.get("format") != _FORMAT or not isinstance(listed, list):
        return f"is no checkpoint that EdgeLM wrote (it has no {FILE_LIST})"
    name = first_unlisted(folder, lambda path: path in listed)
    return None if name is None else f"holds {name}, which is not in its {FILE_LIST}"


CHECKPOINT = OutputKind("a checkpoint", _unknown_content, seal=_seal)
"""A checkpoint folder. It may be replaced if EdgeLM wrote every file in it."""
