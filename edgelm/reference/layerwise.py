"""Run the reference layer by layer from disk, for models whose float32 weights do not fit into memory.

One run reads every layer once, for several sequences of different lengths. Memory holds the attention weights of one
layer, the weights of one expert, and one block of rows of the head. Experts that no token selects are not read.
`edgelm.reference.interpreter` does the arithmetic.

Shape letters: N tokens of all sequences together, T of one sequence, D hidden, E experts, A active experts,
V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgelm.checkpoint import WeightReader
from edgelm.errors import ContextLengthError
from edgelm.models.spec import Attention, Block, Decoder, Dense
from edgelm.progress import Progress, Silent
from edgelm.reference.hooks import Hooks
from edgelm.reference.interpreter import Interpreter
from edgelm.reference.kv_cache import KVCache, Trace
from edgelm.reference.matmul import linear
from edgelm.slices import slices

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

HEAD_BLOCK_BYTES = 64 << 20  # float32 weights of the head in memory; a head of 256000 x 2048 takes 2 GB
WINDOW_BYTES = 768 << 20  # intermediate results of a layer for the windows that are computed together

ReadRows = Callable[[str, slice], Floats]
"""Function that returns rows of a tensor in float32."""

Visit = Callable[[int, int, Tensor, "Tensor | None", Trace], None]
"""Function that is called with (layer, first window, residual stream [n, T, D] after the layer, input [n, T, D] of its
feed-forward block, its trace). Layer -1 is the embedding, without input and trace."""


@dataclass
class SequenceState:
    """State of one sequence: the keys and values of all its positions so far."""

    cache: KVCache

    @property
    def length(self) -> int:
        """Number of positions."""
        return self.cache.length

    def truncate(self, length: int) -> None:
        """Remove all positions from `length` on."""
        self.cache.truncate(length)


@dataclass
class SequenceResult:
    """Results of one run for the T new positions of a sequence.

    Attributes:
        final: float32 [T, D], the normed residual stream, which is the input of the head.
        hidden: L + 1 float32 [T, D]: [0] embedding output, [i + 1] residual stream after layer i. Empty unless traced.
        router_logits: one float32 [T, E] per MoE layer; None for a dense model or unless traced.
        experts: one int64 [T, A] per MoE layer, selected experts by descending weight; None like `router_logits`.
        expert_weights: one float32 [T, A] per MoE layer, their weights as used; None like `router_logits`.
    """

    final: Floats
    hidden: list[Floats] = field(default_factory=list)
    router_logits: list[Floats] | None = None
    experts: list[Ints] | None = None
    expert_weights: list[Floats] | None = None


@dataclass(frozen=True)
class TopLogits:
    """The largest logits of each position.

    Attributes:
        values: float32 [T, k], descending.
        indices: int64 [T, k], their tokens.
        logsumexp: float32 [T] over all V logits; values - logsumexp are log-probabilities.
    """

    values: Floats
    indices: Ints
    logsumexp: Floats


@dataclass
class LayerwiseResult:
    """Result of one run. The head is computed on request, in blocks of rows and for all sequences at once."""

    sequences: list[SequenceResult]
    states: list[SequenceState]
    reference: LayerwiseReference

    def topk(self, k: int, gather: Sequence[Ints] | None = None) -> tuple[list[TopLogits], list[Floats] | None]:
        """Return the k largest logits of every position and, in the same pass over the head, those of given tokens.

        Args:
            k: number of logits, at most V.
            gather: for each sequence int64 [T, m], tokens whose logits to return as well.

        Returns:
            One `TopLogits` per sequence, and one float32 [T, m] per sequence (None without `gather`).
        """
        return self.reference.top_logits([s.final for s in self.sequences], k, gather)

    def gather(self, indices: Sequence[Ints]) -> list[Floats]:
        """Return the logits float32 [T, m] of the tokens `indices` [T, m] of each sequence."""
        _, gathered = self.topk(1, indices)
        assert gathered is not None
        return gathered

    def logits(self) -> Iterator[tuple[slice, list[Floats]]]:
        """Yield (range of the vocabulary, for each sequence its logits [T, tokens in the range]) over the head."""
        lengths = [len(s.final) for s in self.sequences]
        final = torch.from_numpy(np.concatenate([s.final for s in self.sequences]))
        for rows, block in self.reference.head_blocks(final):
            yield rows, [part.numpy() for part in torch.split(block, lengths)]


class LayerWeights:
    """Reads the weights of one layer when they are first needed, and keeps them in memory, except those of experts.

    Args:
        decoder: the model's spec.
        layer: the layer.
        read: returns a tensor in float32.
    """

    def __init__(self, decoder: Decoder, layer: int, read: Callable[[str], Floats]) -> None:
        self._read = read
        self._kept: dict[str, Tensor] = {}
        moe = decoder.moe(layer)
        self._experts = frozenset(() if moe is None else (m.name for m in moe.matrices if m.expert is not None))

    def __call__(self, name: str) -> Tensor:
        """Return the tensor of that name."""
        if name in self._kept:
            return self._kept[name]
        # Shared, not copied: the speed of a run over a big model is limited by memory.
        tensor = torch.from_numpy(self._read(name))
        if name not in self._experts:
            self._kept[name] = tensor
        return tensor

    def replace(self, name: str, tensor: Tensor) -> None:
        """Use another tensor in place of the one of that name."""
        self._kept[name] = tensor

    def forget(self, expert: Dense) -> None:
        """Free the weights of an expert, including replaced ones."""
        for matrix in expert.matrices:
            self._kept.pop(matrix.name, None)


class LayerwiseReference:
    """The reference model of a checkpoint, which reads weights when they are needed."""

    def __init__(
        self,
        decoder: Decoder,
        weights: WeightReader,
        *,
        head_block_bytes: int = HEAD_BLOCK_BYTES,
        hooks: Hooks | None = None,
    ) -> None:
        """Create the model. Nothing is read yet.

        Args:
            decoder: the model's spec.
            weights: where to read tensors.
            head_block_bytes: float32 weights of the head in memory at once.
            hooks: observe or replace the inputs of matmuls, and the keys and values that are cached; None for none.
        """
        self.decoder = decoder
        self.weights = weights
        self.head_block_bytes = head_block_bytes
        self.hooks = hooks

    def new_state(self) -> SequenceState:
        """Return the state of a sequence without positions."""
        return SequenceState(KVCache(self.decoder.num_layers))

    def layer(self, index: int) -> Interpreter:
        """Return the interpreter of layer `index`, which reads its weights from disk."""
        return Interpreter(self.decoder, LayerWeights(self.decoder, index, self.weights.read_float32), self.hooks)

    @torch.no_grad()
    def step(
        self,
        ids: Sequence[Ints],
        states: Sequence[SequenceState] | None = None,
        trace: bool = False,
        progress: Progress | None = None,
    ) -> LayerwiseResult:
        """Compute the new tokens of every sequence in one run over the weights.

        Args:
            ids: for each sequence int64 [T] new tokens, T >= 1; lengths may differ.
            states: the states of the sequences, from an earlier result. They are updated in place; if reading fails,
                they stay unchanged. None: new sequences.
            trace: keep hidden states and routing.
            progress: where to report progress.

        Raises:
            ValueError: the numbers of states and sequences differ, a sequence is empty, or a token is outside the
                vocabulary.
            ContextLengthError: a sequence would be longer than the model's context.
        """
        states = [self.new_state() for _ in ids] if states is None else list(states)
        self._check(ids, states)
        before = [state.length for state in states]
        try:
            final, kept = self._run_layers(ids, states, trace, progress or Silent())
        except BaseException:
            for state, length in zip(states, before, strict=True):
                state.truncate(length)
            raise
        lengths = [len(sequence) for sequence in ids]
        return LayerwiseResult(_by_sequence(final, kept if trace else None, lengths), states, self)

    def _run_layers(
        self, ids: Sequence[Ints], states: Sequence[SequenceState], trace: bool, progress: Progress
    ) -> tuple[Tensor, Trace]:
        """Return the normed residual stream [N, D] of all new tokens, and the trace."""
        lengths = [len(sequence) for sequence in ids]
        x = self._embed(np.concatenate(ids))  # [N, D]
        kept = Trace(hidden=[x])
        caches = [state.cache for state in states]
        with progress.task("reference layers", self.decoder.num_layers, unit="steps") as advance:
            for index, blocks in enumerate(self.decoder.layers):
                run = self.layer(index)
                for block in blocks:
                    if isinstance(block.part, Attention):
                        x = run.attend_sequences(block, x, caches, lengths)
                    else:
                        x = run.block(block, x, None, kept if trace else None)
                if trace:
                    kept.hidden.append(x)
                if self.hooks is not None:
                    self.hooks.after_layer(index)
                advance(1)
        return self._final_norm(x), kept

    @torch.no_grad()
    def windows(
        self, ids: Ints, visit: Visit | None = None, progress: Progress | None = None, *, label: str = "reference"
    ) -> Floats:
        """Run windows of one length, each from position 0, and return the normed residual stream [W, T, D].

        Unlike `step` it keeps no keys and values. Its memory is the residual stream, one layer, and `WINDOW_BYTES` of
        intermediate results. Experts are read once for as many windows as these bytes allow.

        Args:
            ids: int64 [W, T].
            visit: called after every layer; it must copy what it keeps.
            progress: where to report progress.
            label: the label of the progress.

        Raises:
            ValueError, ContextLengthError: as `step`.
        """
        self._check(ids, [self.new_state() for _ in ids])
        x = self._embed(ids.reshape(-1)).view(*ids.shape, -1)
        together = max(1, WINDOW_BYTES // (ids.shape[1] * self._bytes_per_token()))
        starts = range(0, len(ids), together)
        if visit is not None:
            for start in starts:
                visit(-1, start, x[start : start + together], None, Trace())
        with (progress or Silent()).task(label, self.decoder.num_layers * len(ids), unit="steps") as advance:
            for index, blocks in enumerate(self.decoder.layers):
                run = self.layer(index)
                for start in starts:
                    part, trace = slice(start, start + together), Trace()
                    x[part], ff_input = _layer_and_input(run, blocks, x[part], trace)
                    if visit is not None:
                        visit(index, start, x[part], ff_input, trace)
                    advance(len(x[part]))
                if self.hooks is not None:
                    self.hooks.after_layer(index)
        return self._final_norm(x).numpy()

    def _bytes_per_token(self) -> int:
        """Return the approximate bytes of a layer's intermediate results per token: gathered rows, FFN, outputs."""
        active = max(1, self.decoder.active_experts)
        return 4 * (3 * active * self.decoder.hidden_size + 3 * self.decoder.feed_forward_width)

    def _final_norm(self, x: Tensor) -> Tensor:
        def read(name: str) -> Tensor:
            return torch.from_numpy(self.weights.read_float32(name))

        return Interpreter(self.decoder, read).norm(self.decoder.norm, x)

    def _check(self, ids: Sequence[Ints] | Ints, states: Sequence[SequenceState]) -> None:
        if not len(ids) or len(ids) != len(states):
            raise ValueError(f"{len(ids)} sequences and {len(states)} states: expected as many, and at least one")
        limit = self.decoder.context_length
        for i, (sequence, state) in enumerate(zip(ids, states, strict=True)):
            if sequence.ndim != 1 or not len(sequence):
                raise ValueError(f"sequence {i} has the shape {sequence.shape}; expected [T] with T >= 1")
            if sequence.min() < 0 or sequence.max() >= self.decoder.vocab_size:
                raise ValueError(f"sequence {i} has a token outside the vocabulary of {self.decoder.vocab_size}")
            if state.length + len(sequence) > limit:
                raise ContextLengthError(
                    f"sequence {i} would have {state.length + len(sequence)} tokens; the model's context holds {limit}"
                )

    def _embed(self, ids: Ints) -> Tensor:
        """Return the rows [N, D] of the embedding table for ids [N]; each distinct row is read once."""
        rows, places = embedding_rows(self.decoder, self.weights.read_float32, ids)
        return torch.from_numpy(rows[places])

    def head_blocks(self, final: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield the logits of `final` [N, D] as (range of the vocabulary, [N, tokens in the range]), in order."""
        head = self.decoder.head
        if self.hooks is not None:
            final = self.hooks.inputs(head, final)
        size = self.head_block_bytes // (4 * self.decoder.hidden_size)
        for rows, weight in head_weights(self.decoder, self.weights.read_float32, size):
            yield rows, linear(final, weight)

    @torch.no_grad()
    def top_logits(
        self, finals: Sequence[Floats], k: int, gather: Sequence[Ints] | None = None
    ) -> tuple[list[TopLogits], list[Floats] | None]:
        """`LayerwiseResult.topk` for any normed residual streams [T, D], in one pass over the head."""
        if not 1 <= k <= self.decoder.vocab_size:
            raise ValueError(f"k is {k}; expected 1 to the vocabulary's {self.decoder.vocab_size}")
        lengths = [len(final) for final in finals]
        final = torch.from_numpy(np.concatenate(finals))  # [N, D]
        values = torch.empty(len(final), 0)
        indices = torch.empty(len(final), 0, dtype=torch.int64)
        total = torch.full((len(final),), -torch.inf)
        wanted = None if gather is None else torch.from_numpy(_same_width(gather, lengths))  # [N, m]
        found = None if wanted is None else torch.zeros(wanted.shape)
        for rows, block in self.head_blocks(final):
            total = torch.logaddexp(total, block.logsumexp(-1))
            best, places = block.topk(min(k, block.shape[1]))
            values, order = torch.cat([values, best], -1).topk(min(k, values.shape[1] + best.shape[1]))
            indices = torch.cat([indices, places + rows.start], -1).gather(-1, order)
            if wanted is not None and found is not None:
                inside = (wanted >= rows.start) & (wanted < rows.stop)
                local = (wanted - rows.start).clamp(0, block.shape[1] - 1)
                found = torch.where(inside, block.gather(-1, local), found)
        tops = [
            TopLogits(v.numpy(), i.numpy(), t.numpy())
            for v, i, t in zip(
                torch.split(values, lengths), torch.split(indices, lengths), torch.split(total, lengths), strict=True
            )
        ]
        if found is None or gather is None:
            return tops, None
        return tops, [f[:, : g.shape[1]].numpy() for f, g in zip(torch.split(found, lengths), gather, strict=True)]


def embedding_rows(decoder: Decoder, read: ReadRows, ids: Ints) -> tuple[Floats, Ints]:
    """Return the distinct rows [n, D] of the embedding table for `ids` [...], and the row index of each id."""
    wanted, places = np.unique(ids, return_inverse=True)
    rows = [read(decoder.embed.name, slice(int(i), int(i) + 1)) for i in wanted]
    return np.concatenate(rows), places.reshape(ids.shape)


def head_weights(decoder: Decoder, read: ReadRows, size: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield the head in blocks of `size` rows: (range of the vocabulary, weights [tokens in the range, D])."""
    for rows in slices(decoder.vocab_size, size):
        yield rows, torch.from_numpy(read(decoder.head.name, rows))


def _layer_and_input(run: Interpreter, blocks: Sequence[Block], x: Tensor, trace: Trace) -> tuple[Tensor, Tensor]:
    """Return the residual stream [n, T, D] after a layer, and the input of its feed-forward part."""
    ff_input = x
    for block in blocks:
        y = run.norm(block.before, x)
        if not isinstance(block.part, Attention):
            ff_input = y
        x = x + run.norm(block.after, run.part(block.part, y, block.layer, None, trace))
    return x, ff_input


def _same_width(gather: Sequence[Ints], lengths: Sequence[int]) -> Ints:
    """Stack arrays [T, m] of different m into [N, largest m], padded with token 0."""
    for i, (indices, length) in enumerate(zip(gather, lengths, strict=True)):
        if indices.ndim != 2 or len(indices) != length:
            raise ValueError(f"gather for sequence {i} has the shape {indices.shape}; expected [{length}, m]")
    stacked = np.zeros((sum(lengths), max(g.shape[1] for g in gather)), np.int64)
    for start, indices in zip(np.cumsum([0, *lengths]), gather, strict=False):
        stacked[start : start + len(indices), : indices.shape[1]] = indices
    return stacked


def _by_sequence(final: Tensor, kept: Trace | None, lengths: list[int]) -> list[SequenceResult]:
    sequences = [SequenceResult(part.numpy()) for part in torch.split(final, lengths)]
    if kept is None:
        return sequences

    def parts(tensors: list[Tensor]) -> list[list[NDArray[Any]]]:
        """Split one [N, ...] per layer into one [T, ...] per layer for each sequence."""
        split = [[part.numpy() for part in torch.split(tensor, lengths)] for tensor in tensors]
        return [list(layers) for layers in zip(*split, strict=True)]

    for sequence, hidden in zip(sequences, parts(kept.hidden), strict=True):
        sequence.hidden = hidden
    if kept.router_logits:
        routing = zip(parts(kept.router_logits), parts(kept.experts), parts(kept.expert_weights), strict=True)
        for sequence, (logits, experts, weights) in zip(sequences, routing, strict=True):
            sequence.router_logits, sequence.experts, sequence.expert_weights = logits, experts, weights
    return sequences
