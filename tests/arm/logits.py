"""Logits of bundles by Python and by libedgelm, as a file: run on two machines, whose files are then compared.

EDGELM_LIBRARY=libedgelm.so python logits.py OUT.npz BUNDLE...
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import edgelm

sys.path.insert(0, str(Path(__file__).parents[1] / "capi"))
from harness import Model

PROMPT = "import os\n\n\ndef read(path):\n    with open(path) as stream:\n        return"
DECODED = 6
Logits = Callable[[Sequence[int], int], np.ndarray[Any, Any]]


def steps(prompt: list[int], logits: Logits) -> dict[str, np.ndarray[Any, Any]]:
    """Return the logits of every position of the prompt, and of each greedy token after it through the KV cache."""
    prefill = logits(prompt, len(prompt))
    ids, decoded = [*prompt, int(prefill[-1].argmax())], []
    for _ in range(DECODED):
        decoded.append(logits(ids, 1)[0])
        ids.append(int(decoded[-1].argmax()))
    return {"prefill": prefill, "decode": np.stack(decoded), "tokens": np.array(ids)}


def main(out: str, *bundles: str) -> None:
    found = {}
    for bundle in bundles:
        with edgelm.load(bundle, threads=2, chat=False) as python, Model(bundle, threads=2) as c:
            prompt = python.tokenizer.encode(PROMPT)
            assert c.tokenize(PROMPT) == prompt

            def by_python(ids: Sequence[int], positions: int, python: edgelm.LanguageModel = python) -> Any:
                return np.concatenate([rows.copy() for rows in python.cache.logits_of_last(list(ids), positions)])

            for name, logits in (("python", by_python), ("c", c.logits)):
                for kind, values in steps(prompt, logits).items():
                    found[f"{Path(bundle).name} {name} {kind}"] = values
    np.savez(out, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
