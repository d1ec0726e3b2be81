"""Benchmark engine: llama.cpp through llama-cpp-python. Runs in the environment of llama.cpp."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from worker import Engine, serve


class LlamaCpp(Engine):
    """A model of llama.cpp; `flash` and `cache` ("f16" or "q8_0") are its settings."""

    def __init__(self) -> None:
        self.model: Any = None

    def imports(self) -> dict[str, Any]:
        """See `Engine`."""
        import llama_cpp

        return {"version": llama_cpp.__version__}

    def prepare(self, checkpoint: str, out: str, file_type: str, words: bool = False) -> dict[str, Any]:
        """Make the GGUF if it does not exist; return the bytes of it that are read per decoded token.

        With `words` the file has a vocabulary of made-up words, which llama.cpp's server needs.
        """
        from gguf_from_checkpoint import bytes_per_token, write_gguf

        if not Path(out).exists():
            write_gguf(Path(checkpoint), Path(out), file_type, words=words)
        return {"bytes": bytes_per_token(Path(out))}

    def load(self, *, path: str, threads: int, context: int, flash: bool, cache: str) -> dict[str, Any]:
        """See `Engine`."""
        import llama_cpp

        kind = {"f16": llama_cpp.GGML_TYPE_F16, "q8_0": llama_cpp.GGML_TYPE_Q8_0}[cache]
        self.model = llama_cpp.Llama(
            path, n_ctx=context, n_batch=512, n_ubatch=512, n_threads=threads, n_threads_batch=threads,
            flash_attn=flash, type_k=kind, type_v=kind, verbose=False,
        )  # fmt: skip
        return {}

    def run(self, prompt: list[int], new: list[int]) -> dict[str, Any]:
        """See `Engine`."""
        self.model.reset()
        clocks = [time.perf_counter()]
        for part in (prompt, *([token] for token in new)):
            self.model.eval(part)
            int(self._last_logits().argmax())
            clocks.append(time.perf_counter())
        steps = [end - begin for begin, end in pairwise(clocks)]
        return {"prefill": steps[0], "decode": steps[1:]}

    def logits(self, tokens: list[int], lengths: list[int], out: str) -> dict[str, Any]:
        """See `Engine`: one prefill to the first length, then further prefills from there."""
        import numpy as np

        self.model.reset()
        rows = []
        for begin, end in zip([0, *lengths], lengths, strict=False):
            self.model.eval(tokens[begin:end])
            rows.append(self._last_logits().copy())
        np.save(out, np.stack(rows))
        return {}

    def quantize(
        self, checkpoint: str, whole: str, kind: str, out: str, file_type: str | None, squares: str | None
    ) -> dict[str, Any]:
        """Make a GGUF, write its dequantised weights to `out` + ".npz", and return its types.

        `whole` is the float GGUF of type `kind`, which is made from the checkpoint if it does not exist, and is used
        itself if `file_type` is None. `squares`: an .npz file with the mean squares of the matrices' inputs.
        """
        import numpy as np
        from gguf_from_checkpoint import dequantized, importance_of, quantize, stored_types, write_float

        folder, made = Path(checkpoint), Path(whole if file_type is None else out)
        if not Path(whole).exists():
            write_float(folder, Path(whole), kind)
        if file_type is not None:
            quantize(Path(whole), made, file_type, importance_of(folder, np.load(squares)) if squares else None)
        np.savez(f"{out}.npz", **dict(dequantized(folder, made)))
        return {"path": str(made), "types": stored_types(made)}

    def all_logits(self, path: str, windows: str, out: str) -> dict[str, Any]:
        """Write the logits [windows, tokens, vocabulary] of every window in the .npy file `windows` to `out`.

        The KV cache is float32, so that its loss is not counted as a loss of the weights' format.
        """
        import llama_cpp
        import numpy as np

        tokens = np.load(windows)
        count = tokens.shape[1]
        model = llama_cpp.Llama(path, n_ctx=count, n_batch=count, n_ubatch=count, n_threads=1, n_threads_batch=1,
                                logits_all=True, verbose=False,
                                type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32)  # fmt: skip
        found = np.empty((*tokens.shape, model.n_vocab()), np.float32)
        for logits, window in zip(found, tokens, strict=True):
            model.reset()
            model.eval(window.tolist())
            logits[:] = model.scores[:count]
        np.save(out, found)
        return {}

    def _last_logits(self) -> Any:
        import llama_cpp
        import numpy as np

        pointer = llama_cpp.llama_get_logits_ith(self.model._ctx.ctx, -1)
        return np.ctypeslib.as_array(pointer, (self.model.n_vocab(),))


if __name__ == "__main__":
    serve(LlamaCpp())
