"""Write the tokenizer of the tiny OLMoE with further tokens, such as those before calls of tools."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from tokenizer_folders import example, put

MARKERS = ("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "<|tool_call|>", "<|/tool_call|>")
FIRST = 2024
"""The id of the first marker."""
ROWS = 2048
"""Logits of the tiny OLMoE: more than its tokenizer has tokens."""


def marked(folder: Path, *, special: bool) -> Path:
    """Return a folder with the tokenizer and the markers, as special tokens or as ordinary added tokens."""
    example(folder, "olmoe-tiny")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
    for index, content in enumerate(MARKERS, FIRST):
        tokenizer["added_tokens"].append({"id": index, "content": content, **flags})
        config["added_tokens_decoder"][str(index)] = {"content": content, **flags}
    put(folder, "tokenizer.json", tokenizer)
    put(folder, "tokenizer_config.json", config)
    return folder
