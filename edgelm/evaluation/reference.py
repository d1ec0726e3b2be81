"""Run a model over the windows layer by layer, and compare other models with it. Needs torch.

Memory: the final normed states of all tokens, one layer, and blocks of logits, but not the logits of all tokens. The
head is read in blocks of rows for every group of tokens, or kept in memory where it is small.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgelm.checkpoint import WeightReader
from edgelm.evaluation.distances import Comparison, Predictions
from edgelm.evaluation.experts import ExpertProbe
from edgelm.evaluation.layers import LayerSketches
from edgelm.models.spec import Decoder
from edgelm.progress import Progress, Silent
from edgelm.reference.hooks import Hooks
from edgelm.reference.kv_cache import Trace
from edgelm.reference.layerwise import LayerwiseReference

LOGITS_BYTES = 128 << 20
"""Bytes of one model's float32 logits in memory at once."""
KEEP_HEAD_BYTES = 1 << 30
"""Largest float32 head that is kept in memory where it is needed for every group of tokens."""

Floats32 = NDArray[np.float32]
Ints = NDArray[np.int64]


class WeightModel:
    """A model given by its weights, run over the windows layer by layer.

    Attributes:
        model: the PyTorch reference that runs it.
        ids: int64 [W, T], the input tokens.
        following: int64 [W * T], the token after each of them.
        final: float32 [W * T, D], the input of the head.
        sketches: the layers' sketches; None unless requested.
    """

    def __init__(
        self,
        decoder: Decoder,
        weights: WeightReader,
        windows: Sequence[Ints],
        *,
        layers: bool = False,
        probe: ExpertProbe | None = None,
        progress: Progress | None = None,
        label: str = "float model",
        logits_bytes: int = LOGITS_BYTES,
        hooks: Hooks | None = None,
    ) -> None:
        """Run the windows, each int64 [T + 1]; the last token is only predicted.

        Args:
            decoder: the model's spec.
            weights: where to read tensors.
            windows: token ids, all of one length.
            layers: keep a `LayerSketches`.
            probe: gets the inputs of every expert.
            progress: where to report progress.
            label: the label of the progress.
            logits_bytes: bytes of logits in memory at once; does not change results.
            hooks: quantisation of activations and of the KV cache.

        Raises:
            CheckpointError, ContextLengthError: as `LayerwiseReference.windows`.
        """
        stacked = np.stack(windows)
        self.ids, self.following = stacked[:, :-1], stacked[:, 1:].reshape(-1)
        self.model = LayerwiseReference(decoder, weights, hooks=hooks)
        self._logits_bytes = logits_bytes
        self.sketches: LayerSketches | None = None
        if layers:
            self.sketches = LayerSketches(
                decoder.num_layers, self.ids.size, decoder.hidden_size, decoder.active_experts
            )
        self._probe = probe
        visit = self._visit if layers or probe is not None else None
        self.final: Floats32 = self.model.windows(self.ids, visit, progress, label=label).reshape(
            self.ids.size, decoder.hidden_size
        )

    def _visit(self, layer: int, first: int, x: Tensor, inputs: Tensor | None, trace: Trace) -> None:
        start = first * self.ids.shape[1]
        if self.sketches is not None:
            self.sketches.put(layer, start, x.reshape(-1, x.shape[-1]).numpy())
        if inputs is None or not trace.experts:
            return
        chosen = trace.experts[0].reshape(-1, trace.experts[0].shape[-1])
        if self.sketches is not None:
            self.sketches.put_experts(layer, start, chosen.numpy())
        if self._probe is not None:
            self._probe.add(layer, inputs.reshape(-1, inputs.shape[-1]), chosen)

    def compare(self, target: WeightModel, progress: Progress | None = None) -> Comparison:
        """Compare with another model over the same windows, in one pass over both heads."""
        found = Comparison(self.following)
        with (progress or Silent()).task("logits", self.model.decoder.vocab_size, unit="steps") as advance:
            mine, theirs = self._blocks(), target._blocks()
            for (rows, expected), (same_rows, logits) in zip(mine, theirs, strict=True):
                assert rows == same_rows
                found.add(rows.start, expected.numpy(), logits.numpy())
                advance(rows.stop - rows.start)
        return found

    def predictions(self) -> Predictions:
        """Return the predictions of this model alone."""
        found = Predictions(self.following)
        for rows, logits in self._blocks():
            found.add(rows.start, logits.numpy())
        return found

    def compare_logits(self, blocks: Iterable[Floats32]) -> Comparison:
        """Compare with blocks of logits [n, V] of the tokens in order, from any source.

        A block may be overwritten when the next one is requested.

        Raises:
            ValueError: the blocks have more or fewer rows than there are tokens.
        """
        found, model = Comparison(self.following), self._with_head()
        first = 0
        for logits in _group_blocks(blocks, max(1, self._logits_bytes // (4 * model.decoder.vocab_size))):
            final = torch.from_numpy(self.final[first : first + len(logits)])
            if len(final) < len(logits):
                raise ValueError(f"more logits than the {len(self.final)} tokens")
            for rows, expected in model.head_blocks(final):
                found.add(rows.start, expected.numpy(), logits[:, rows], first)
            first += len(logits)
        if first < len(self.final):
            raise ValueError(f"logits of {first} tokens, there are {len(self.final)}")
        return found

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the logits [N, v] of all tokens in blocks of the vocabulary."""
        width = max(1, self._logits_bytes // (4 * len(self.final)))
        self.model.head_block_bytes = 4 * self.model.decoder.hidden_size * width
        yield from self.model.head_blocks(torch.from_numpy(self.final))

    def _with_head(self) -> LayerwiseReference:
        decoder = self.model.decoder
        if 4 * decoder.vocab_size * decoder.hidden_size > KEEP_HEAD_BYTES:
            return self.model
        kept = _CachedHead(self.model.weights, decoder.head.name)
        return LayerwiseReference(decoder, kept, hooks=self.model.hooks)


class _CachedHead:
    """A `WeightReader` that keeps the head in memory."""

    def __init__(self, weights: WeightReader, name: str) -> None:
        self._weights = weights
        self._name = name
        self._head = weights.read_float32(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._weights.shape(name)

    def read_float32(self, name: str, rows: slice | None = None) -> Floats32:
        if name != self._name:
            return self._weights.read_float32(name, rows)
        return self._head if rows is None else self._head[rows]


def _group_blocks(blocks: Iterable[Floats32], rows: int) -> Iterator[Floats32]:
    """Concatenate blocks into groups of up to `rows` rows (or one larger block), for fewer passes over the head."""
    waiting: list[Floats32] = []
    count = 0
    for block in blocks:
        if waiting and count + len(block) > rows:
            yield np.concatenate(waiting)
            waiting, count = [], 0
        waiting.append(block.copy())
        count += len(block)
    if waiting:
        yield np.concatenate(waiting)
