"""Benchmark engine: OpenVINO GenAI. Runs in the environment of OpenVINO.

It times the pipeline with paged attention, OpenVINO's default for generation from token ids on this kind of CPU, which
computes the head for the last token only. The pipeline gives no logits. So they are computed from the same files in
plain OpenVINO, and the pipeline's tokens are checked against them.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from worker import Engine, serve

BLOCK = 32
# Both round activations and cache to 8 bits, in different blocks, so their logits differ somewhat.
LOG_PROBABILITY = 0.3


class OpenVino(Engine):
    """A pipeline of OpenVINO GenAI."""

    def __init__(self) -> None:
        self.pipeline: Any = None
        self.folder = Path()
        self.properties: dict[str, Any] = {}
        self.requests = 0

    def imports(self) -> dict[str, Any]:
        """See `Engine`."""
        import openvino
        import openvino_genai

        return {"version": f"{openvino_genai.__version__} on {openvino.__version__}"}

    def load(self, *, path: str, threads: int, context: int) -> dict[str, Any]:
        """See `Engine`."""
        import openvino_genai

        self.folder, self.properties = Path(path), {"INFERENCE_NUM_THREADS": threads}
        scheduler = openvino_genai.SchedulerConfig()
        # Prefill in one step, and no prefix caching, so that every repetition does the same work.
        scheduler.max_num_batched_tokens = context
        scheduler.num_kv_blocks = -(-context // BLOCK) + 2
        scheduler.enable_prefix_caching = False
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(self.folder, scheduler, "CPU", self.properties)
        return {}

    def run(self, prompt: list[int], new: list[int]) -> dict[str, Any]:
        """See `Engine`; but it continues with its own most likely tokens, since it accepts no others."""
        handle = self._request(prompt, 1 + len(new))
        steps = []
        while self.pipeline.has_non_finished_requests():
            begin = time.perf_counter()
            self.pipeline.step()
            steps.append(time.perf_counter() - begin)
        made = len(handle.read_all()[0].generated_ids)
        if made != 1 + len(new):
            raise RuntimeError(f"OpenVINO made {made} tokens of {1 + len(new)}: is the context too short?")
        # A prompt may take several steps.
        first = len(steps) - len(new)
        return {"prefill": sum(steps[:first]), "decode": steps[first:]}

    def logits(self, tokens: list[int], lengths: list[int], out: str) -> dict[str, Any]:
        """See `Engine`."""
        import numpy as np

        rows = self._plain_logits(tokens)[[length - 1 for length in lengths]].astype(np.float32)
        for length, row in zip(lengths, rows, strict=True):
            handle = self._request(tokens[:length], 1)
            while self.pipeline.has_non_finished_requests():
                self.pipeline.step()
            found = handle.read_all()[0]
            token, probability = found.generated_ids[0], found.generated_log_probs[0]
            expected = float(row[token] - row.max() - np.log(np.exp(row - row.max(), dtype=np.float64).sum()))
            # In a near-tie either token may be chosen.
            if abs(probability - expected) > LOG_PROBABILITY or row[token] < row.max() - LOG_PROBABILITY:
                raise RuntimeError(
                    f"the pipeline's token {token} after {length} has log probability {probability:.3f}, plain "
                    f"OpenVINO gives it {expected:.3f} and its best token {row.max() - row[token]:.3f} more"
                )
        np.save(out, rows)
        return {}

    def _request(self, prompt: list[int], count: int) -> Any:
        import numpy as np
        import openvino
        import openvino_genai

        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample, config.logprobs = count, True, False, 1
        self.requests += 1
        return self.pipeline.add_request(self.requests, openvino.Tensor(np.array([prompt], np.int64)), config)

    def _plain_logits(self, tokens: list[int]) -> Any:
        import numpy as np
        import openvino

        core = openvino.Core()
        model = core.compile_model(core.read_model(self.folder / "openvino_model.xml"), "CPU", self.properties)
        count = len(tokens)
        feed = {
            "input_ids": np.array([tokens], np.int64),
            "attention_mask": np.ones((1, count), np.int64),
            "position_ids": np.arange(count, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        wanted = {name for port in model.inputs for name in port.get_names()}
        return model({name: value for name, value in feed.items() if name in wanted})["logits"][0].copy()


if __name__ == "__main__":
    serve(OpenVino())
