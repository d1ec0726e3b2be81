"""How fast is transformers on this GPU with models of the published shapes (bf16, random weights)?

    python tests/bench/gpu_peer.py [--model olmoe-1b-7b] [--repeat 3]
    python tests/bench/gpu_peer.py --tiny          # a small model on the CPU, to test this script

The figures are compared with those of `gpu_models.py`, which runs in another process, so that a failure of one does not
affect the other. Decoding is captured as a CUDA graph where transformers allows it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers  # type: ignore[import-untyped]  # has no type information here
from gpu_models import TINY, positions

from edgelm.synth import PUBLISHED

_EAGER = 2


class Peer:
    """A model of transformers with random weights."""

    def __init__(self, config: dict[str, Any], device: str) -> None:
        self.device = device
        self.config = transformers.AutoConfig.for_model(**config)
        with torch.device(device):
            model = transformers.AutoModelForCausalLM.from_config(self.config, dtype=torch.bfloat16)
        self.model = model.eval()

    def decode(self, context: int, steps: int, runs: int) -> tuple[Callable[[], float], bool]:
        """Return a function that times `steps` steps after `context` tokens (median), and whether it runs a CUDA graph.

        The cache counts its tokens, also in a captured graph, and a step beyond its end is a device error that ends the
        process. So it has room for `runs` calls.
        """
        cache = transformers.StaticCache(config=self.config, max_cache_len=context + _EAGER + runs * steps)
        ids = torch.randint(0, self.config.vocab_size, (1, context), device=self.device)
        token = torch.zeros((1, 1), dtype=torch.long, device=self.device)
        place = torch.tensor([[context]], device=self.device)

        def step() -> Any:
            return self.model(token, past_key_values=cache, position_ids=place).logits[:, -1].argmax(-1, keepdim=True)

        run: Callable[[], Any] = step
        captured = False
        with torch.no_grad():
            self.model(ids, past_key_values=cache, logits_to_keep=1)
            step()
            if self.device == "cuda":
                try:
                    run, captured = self._captured(step), True
                except RuntimeError as error:  # a step that reads results back cannot be captured: time it without
                    torch.cuda.synchronize()
                    print(f"transformers cannot be captured ({str(error).splitlines()[0]}): timed eagerly", flush=True)

        def timed() -> float:
            times = []
            with torch.no_grad():
                for _ in range(steps):
                    start = time.perf_counter()
                    int(run().item())
                    times.append(time.perf_counter() - start)
            return statistics.median(times)

        return timed, captured

    def _captured(self, step: Callable[[], Any]) -> Callable[[], Any]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            chosen = step()

        def replay() -> Any:
            graph.replay()
            return chosen

        return replay

    def prefill(self, tokens: int) -> float:
        """Return the wall seconds of a prefill with the logits of the last token."""
        ids = torch.randint(0, self.config.vocab_size, (1, tokens), device=self.device)
        self._wait()
        start = time.perf_counter()
        with torch.no_grad():
            self.model(ids, logits_to_keep=1, use_cache=True)
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def measure(name: str, repeat: int, *, tiny: bool) -> list[dict[str, Any]]:
    """Return the rows of one model."""
    config = dict(PUBLISHED[name]) | (TINY if tiny else {})
    at = positions(config)
    peer = Peer(config, "cpu" if tiny else "cuda")
    step, captured = peer.decode(at.context, at.steps, repeat + 1)
    step()
    found = {f"decode{' (CUDA graph)' if captured else ' (eager)'}": ([step() for _ in range(repeat)], 1)}
    peer.prefill(at.long)
    found[f"prefill {at.long}"] = ([peer.prefill(at.long) for _ in range(repeat)], at.long)
    rows = []
    for what, (seconds, tokens) in found.items():
        median = statistics.median(seconds)
        row = {"name": f"transformers {name} bf16 {what}", "median_s": median, "rate": tokens / median}
        rows.append(row | {"low_s": min(seconds), "high_s": max(seconds)})
        print(f"{row['name']:56} {median * 1e3:9.3f} ms {row['rate']:10.1f} tokens/s", flush=True)
    return rows


def main() -> int:
    """Run the requested measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=list(PUBLISHED))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a small model on the CPU")
    given = parser.parse_args()
    if not given.tiny and not torch.cuda.is_available():
        raise SystemExit("no NVIDIA driver: PyTorch sees no GPU")
    print(f"transformers {transformers.__version__}, torch {torch.__version__}", flush=True)
    rows = [row for name in given.model or PUBLISHED for row in measure(name, given.repeat, tiny=given.tiny)]
    print(json.dumps({"rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
