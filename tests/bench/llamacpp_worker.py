"""llama.cpp as an engine of the benchmark, through llama-cpp-python. Runs in the peer's environment."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from worker import Engine, serve


class LlamaCpp(Engine):
    """One model; `flash` and `cache` ("f16" or "q8_0") are its settings."""

    def __init__(self) -> None:
        self.model: Any = None

    def imports(self) -> dict[str, Any]:
        """As the base class."""
        import llama_cpp

        return {"version": llama_cpp.__version__}

    def prepare(self, checkpoint: str, out: str, file_type: str) -> dict[str, Any]:
        """Make the GGUF if there is none; return the bytes that decoding a token reads of it."""
        from gguf_from_checkpoint import bytes_per_token, write_gguf

        if not Path(out).exists():
            write_gguf(Path(checkpoint), Path(out), file_type)
        return {"bytes": bytes_per_token(Path(out))}

    def load(self, *, path: str, threads: int, context: int, flash: bool, cache: str) -> dict[str, Any]:
        """As the base class."""
        import llama_cpp

        kind = {"f16": llama_cpp.GGML_TYPE_F16, "q8_0": llama_cpp.GGML_TYPE_Q8_0}[cache]
        self.model = llama_cpp.Llama(
            path, n_ctx=context, n_batch=512, n_ubatch=512, n_threads=threads, n_threads_batch=threads,
            flash_attn=flash, type_k=kind, type_v=kind, verbose=False,
        )  # fmt: skip
        return {}

    def run(self, prompt: list[int], new: list[int]) -> dict[str, Any]:
        """As the base class."""
        self.model.reset()
        clocks = [time.perf_counter()]
        for part in (prompt, *([token] for token in new)):
            self.model.eval(part)
            int(self._last_logits().argmax())
            clocks.append(time.perf_counter())
        steps = [end - begin for begin, end in pairwise(clocks)]
        return {"prefill": steps[0], "decode": steps[1:]}

    def logits(self, tokens: list[int], lengths: list[int], out: str) -> dict[str, Any]:
        """As the base class: a prefill to the first length, further ones from there."""
        import numpy as np

        self.model.reset()
        rows = []
        for begin, end in zip([0, *lengths], lengths, strict=False):
            self.model.eval(tokens[begin:end])
            rows.append(self._last_logits().copy())
        np.save(out, np.stack(rows))
        return {}

    def _last_logits(self) -> Any:
        import llama_cpp
        import numpy as np

        pointer = llama_cpp.llama_get_logits_ith(self.model._ctx.ctx, -1)
        return np.ctypeslib.as_array(pointer, (self.model.n_vocab(),))


if __name__ == "__main__":
    serve(LlamaCpp())
