"""llama.cpp behind a pipe: reads one JSON command a line, answers one JSON line. Runs in the peer's environment."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp
from gguf_from_checkpoint import write_gguf

from edgelm.devices import resident_memory


class Peer:
    def __init__(self) -> None:
        self.model: Any = None

    def prepare(self, checkpoint: str, gguf: str, file_type: str) -> dict[str, Any]:
        if not Path(gguf).exists():
            write_gguf(Path(checkpoint), Path(gguf), file_type)
        return {"bytes": Path(gguf).stat().st_size}

    def load(self, gguf: str, threads: int, context: int, flash: bool) -> dict[str, Any]:
        start = time.perf_counter()
        self.model = llama_cpp.Llama(
            gguf, n_ctx=context, n_batch=512, n_threads=threads, n_threads_batch=threads, flash_attn=flash,
            verbose=False,
        )  # fmt: skip
        return {"seconds": time.perf_counter() - start, "version": llama_cpp.__version__}

    def prefill(self, tokens: list[int]) -> dict[str, Any]:
        self.model.reset()
        start = time.perf_counter()
        self.model.eval(tokens)
        return {"seconds": time.perf_counter() - start}

    def decode(self, tokens: list[int]) -> dict[str, Any]:
        start = time.perf_counter()
        for token in tokens:
            self.model.eval([token])
        return {"seconds": time.perf_counter() - start, "resident": resident_memory()[0]}

    def logits(self, tokens: list[int]) -> dict[str, Any]:
        self.model.reset()
        self.model.eval(tokens)
        pointer = llama_cpp.llama_get_logits_ith(self.model._ctx.ctx, -1)
        return {"logits": [round(pointer[i], 4) for i in range(self.model.n_vocab())]}


def main() -> None:
    peer = Peer()
    for line in sys.stdin:
        command = json.loads(line)
        result = getattr(peer, command.pop("do"))(**command)
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
