"""Benchmark engine: a bundle run by EdgeLM."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

from worker import Engine, serve


class EdgeLm(Engine):
    """A bundle in one runtime; `kv` is the type of its KV cache, None for the bundle's own."""

    def __init__(self) -> None:
        self.runtime: Any = None
        self.options: dict[str, Any] = {}
        self.batches: dict[int, Any] = {}

    def imports(self) -> dict[str, Any]:
        """See `Engine`."""
        import onnxruntime

        import edgelm
        import edgelm.runtimes
        from edgelm.bundle import Bundle

        assert Bundle is edgelm.Bundle
        return {"version": f"{edgelm.__version__} on onnxruntime {onnxruntime.__version__}"}

    def load(self, *, path: str, threads: int, context: int, kv: str | None) -> dict[str, Any]:
        """See `Engine`."""
        from edgelm.bundle import Bundle
        from edgelm.runtimes import open_runtime

        self.options = {"bundle": Bundle.open(path), "threads": threads, "context_length": context, "kv": kv}
        self.runtime = open_runtime(**self.options)
        return {}

    def run(self, prompt: list[int], new: list[int]) -> dict[str, Any]:
        """See `Engine`."""
        runtime = self.runtime
        runtime.reset()
        clocks = [time.perf_counter()]
        int(runtime.prefill(prompt).argmax())
        clocks.append(time.perf_counter())
        for token in new:
            int(runtime.decode(token).argmax())
            clocks.append(time.perf_counter())
        steps = [end - begin for begin, end in pairwise(clocks)]
        return {"prefill": steps[0], "decode": steps[1:]}

    def logits(self, tokens: list[int], lengths: list[int], out: str) -> dict[str, Any]:
        """See `Engine`: one prefill to the first length, then further prefills from there."""
        import numpy as np

        self.runtime.reset()
        rows = [
            self.runtime.prefill(tokens[begin:end]).copy()
            for begin, end in zip([0, *lengths], lengths, strict=False)
        ]  # fmt: skip
        np.save(out, np.stack(rows))
        return {}

    def batch(self, prompts: list[list[int]], new: list[list[int]]) -> dict[str, Any]:
        """Decode as many sequences together as there are prompts; `new` has one token for each, step by step.

        Returns:
            "decode": the seconds of each step.
        """
        from edgelm.runtimes.onnxruntime.native import NativeBatch

        count = len(prompts)
        if count not in self.batches:
            self.batches[count] = NativeBatch(batch=count, **self.options)
        model = self.batches[count]
        for row, prompt in enumerate(prompts):
            model.truncate(row, 0)
            model.prefill(row, prompt)
        clocks = [time.perf_counter()]
        for tokens in new:
            model.decode_batch(tokens).argmax(axis=1)
            clocks.append(time.perf_counter())
        return {"decode": [end - begin for begin, end in pairwise(clocks)]}


if __name__ == "__main__":
    serve(EdgeLm())
