"""Describe a tokenizer for programs without Python: `tokenizer.edgelm.json` of a bundle, which export writes.

The files of a checkpoint contradict each other, and `added_tokens`, `special_tokens`, `tokenizer_json` and `vocabulary`
resolve that. The description has their results, so that libedgelm repeats none of it: it reads the vocabulary, merges
and scores from the file that `file` names, and everything else from here. docs/reference/bundle.md lists the fields.

Both kinds of files have the fields of `describe`, and those that `Vocabulary.describe` adds:

- tokenizer.json, `kind` "json": `normalizer` and `pre_tokenizer`, lists of steps without nesting, whose fields are all
  given; `model` with its settings, but neither vocabulary nor merges; `decoder`.
- tokenizer.model, `kind` "pieces":
  - `rules`: "merges" are those of transformers' BPE, which merges by id, does not normalise, and uses pieces of any
    type as normal ones; "model" are those of the file itself. By "merges" a token is a byte if its name is like
    "<0x0A>", by "model" if its type is BYTE.
  - `normalizer`, as above: for finding the added tokens whose `normalized` is true. The text between them is encoded as
    it was.
  - `prefix`: where a space is prepended, "always" to each part of a text between added tokens, to the "first" one if it
    begins the text, or "never"; and never before a space or "\u2581".
  - `unknown_id`, null without one; `drops_unknown`, whether it is left out of the ids; `unknown_text`, what it adds to
    a text by the rules "model", and to fingerprints by both.
  - `verbatim`: ids whose token is the text that they add.

A tokenizer whose steps libedgelm does not have gets `unsupported`, the reason, in place of its steps.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgelm.tokenization.described_steps import UnsupportedError
from edgelm.tokenization.template_files import DEFAULT, read_templates
from edgelm.tokenization.tokenizer import Tokenizer

FILE = "tokenizer.edgelm.json"
FORMAT, FORMAT_VERSION = "edgelm-tokenizer", 1


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def describe(tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    """Return the description of the tokenizer of `folder`."""
    vocabulary = tokenizer.vocabulary
    try:
        own = vocabulary.describe()
    except UnsupportedError as error:
        own = {"unsupported": str(error)}
    templates = read_templates(folder)
    template = templates.get(DEFAULT) if len(templates) > 1 else next(iter(templates.values()), None)
    if template is not None and not _is_unicode(template):
        template = None
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.template_eos_id, "pad_token": tokenizer.pad_id}
    strings = {name: tokenizer.token(index) for name, index in ids.items() if index is not None}
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "file": "tokenizer.json" if (folder / "tokenizer.json").exists() else "tokenizer.model",
        "size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "eos_ids": list(tokenizer.eos_ids),
        "pad_id": tokenizer.pad_id,
        "template_eos_id": tokenizer.template_eos_id,
        "add_bos": tokenizer.add_bos,
        "special": sorted(tokenizer.special),
        "leading_space": vocabulary.leading_space.value,
        "fingerprint": tokenizer.fingerprint_fields(),
        "special_tokens": {name: token for name, token in strings.items() if token is not None},
        "chat_template": template,
        **own,
    }


def write(tokenizer: Tokenizer, folder: Path, out: Path) -> None:
    """Write the description of the tokenizer of `folder` to `out`; equal folders give equal bytes."""
    text = json.dumps(describe(tokenizer, folder), indent=1, ensure_ascii=False) + "\n"
    out.write_text(text, encoding="utf-8", newline="\n")
