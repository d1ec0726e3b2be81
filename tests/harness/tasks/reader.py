"""What the tasks beside this file are read with: the harness's own way keeps a copy in the user's cache."""

import json
from pathlib import Path
from typing import Any

import datasets


def read(file: str, **_: Any) -> dict[str, datasets.Dataset]:
    """The splits of a .jsonl file beside this one: two lines of examples, then what is asked."""
    lines = (Path(__file__).parent / file).read_text(encoding="utf-8").splitlines()
    items = [json.loads(line) for line in lines]
    return {"train": datasets.Dataset.from_list(items[:2]), "test": datasets.Dataset.from_list(items[2:])}
