"""Make a parity pack: run the PyTorch reference over the golden prompts, layer by layer from disk.

The golden prompts are those whose results the pack stores. The float reference runs first: one sweep over all prompts,
then one sweep per greedy token. The quantised reference needs a single sweep over the prompts and the float
reference's continuation, so that both references and the device are compared on the same tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgelm.devices import allowed_cores
from edgelm.errors import ParityError
from edgelm.models.spec import Decoder, Matrix
from edgelm.parity.pack import (
    PROBES,
    TOP,
    GoldenPrompt,
    ParityPack,
    ReferenceRecord,
    RoundedRecord,
    TokenizerPrint,
)
from edgelm.parity.prompts import BUILT_IN, Prompt, load_prompts
from edgelm.parity.sketch import SKETCH_WIDTH, probe_ids, sign_matrix
from edgelm.progress import Advance, Progress, Silent
from edgelm.version import __version__

if TYPE_CHECKING:
    from edgelm.checkpoint import WeightReader
    from edgelm.reference.hooks import Hooks
    from edgelm.reference.layerwise import LayerwiseReference, LayerwiseResult, SequenceState
    from edgelm.tokenization.tokenizer import Tokenizer

# With at least this many weights a sweep takes seconds, so prompts and continuations are kept short.
BIG = 300_000_000
GREEDY_TOKENS, GREEDY_TOKENS_BIG, GREEDY_PROMPTS_BIG = 16, 8, 2
MAX_PROMPT_TOKENS, MAX_PROMPT_TOKENS_BIG, MAX_PROMPT_TOKENS_OWN = 512, 96, 2048


@dataclass(frozen=True)
class GoldenOptions:
    """Contents of a pack.

    Attributes:
        prompts: the golden prompts.
        greedy_tokens: length of each greedy continuation; None: 16, or 8 for a big model.
        greedy_prompts: number of prompts, from the first, that are continued; None: all, or 2 for a big model.
        max_prompt_tokens: longer prompts are cut to this, and to the model's context; None: 512, or 96 if big.
    """

    prompts: tuple[Prompt, ...] = BUILT_IN
    greedy_tokens: int | None = None
    greedy_prompts: int | None = None
    max_prompt_tokens: int | None = None

    @classmethod
    def from_arguments(cls, prompts_file: Path | None, greedy_tokens: int | None) -> GoldenOptions:
        """Return the options of the command line; None keeps a default.

        Raises:
            ParityError: the file holds no prompts.
        """
        if prompts_file is None:
            return cls(greedy_tokens=greedy_tokens)
        return cls(load_prompts(prompts_file), greedy_tokens, max_prompt_tokens=MAX_PROMPT_TOKENS_OWN)

    def resolved(self, decoder: Decoder) -> GoldenOptions:
        """Return these options with every None replaced by the default for the model's size."""
        big = weight_count(decoder) >= BIG
        tokens, prompts, length = self.greedy_tokens, self.greedy_prompts, self.max_prompt_tokens
        if tokens is None:
            tokens = GREEDY_TOKENS_BIG if big else GREEDY_TOKENS
        if prompts is None:
            prompts = GREEDY_PROMPTS_BIG if big else len(self.prompts)
        if length is None:
            length = MAX_PROMPT_TOKENS_BIG if big else MAX_PROMPT_TOKENS
        return replace(self, greedy_tokens=tokens, greedy_prompts=prompts, max_prompt_tokens=length)

    def rounded_prompts(self, decoder: Decoder) -> int:
        """Return how many prompts, from the first, are also run with rounded activations.

        For a big model these are the continued ones (a tenth of the arithmetic), at least one.
        """
        return max(1, self.resolved(decoder).greedy_prompts or 0) if weight_count(decoder) >= BIG else len(self.prompts)


@dataclass(frozen=True)
class DeviceRounding:
    """Rounding of a device besides that of the weights.

    Attributes:
        blocks: matrices whose inputs are quantised to int8, with the columns of a block.
        kv: data type of the KV cache, as `round_cache` names it.
    """

    blocks: Mapping[str, int]
    kv: str

    @property
    def is_exact(self) -> bool:
        """Return whether nothing is rounded."""
        return not self.blocks and self.kv == "float32"

    def hooks(self) -> Hooks:
        """Return hooks that make a reference round likewise; needs torch."""
        from edgelm.quant.activations import int8_blocks, round_cache
        from edgelm.reference.hooks import Hooks

        blocks, kv = self.blocks, self.kv

        class Rounding(Hooks):
            def inputs(self, matrix: Matrix, x: Any) -> Any:
                return int8_blocks(x, blocks[matrix.name]) if matrix.name in blocks else x

            def cached(self, layer: int, keys: Any, values: Any) -> tuple[Any, Any]:
                return round_cache(keys, values, kv)

        return Rounding()


def weight_count(decoder: Decoder) -> int:
    """Return roughly the weights of a model: tables, attention as four square matrices, feed-forward blocks."""
    blocks = 3 * decoder.feed_forward_width * max(decoder.num_experts, 1) + 4 * decoder.hidden_size
    return decoder.hidden_size * (2 * decoder.vocab_size + decoder.num_layers * blocks)


def golden_tokens(options: GoldenOptions, tokenizer: Tokenizer, decoder: Decoder) -> int:
    """Return an upper bound of the positions in a sweep, which determine the memory that making a pack takes."""
    continued = GREEDY_TOKENS if options.greedy_tokens is None else options.greedy_tokens
    longest = MAX_PROMPT_TOKENS if options.max_prompt_tokens is None else options.max_prompt_tokens
    lengths = [min(len(tokenizer.encode(prompt.text)), longest) + continued for prompt in options.prompts]
    return sum(lengths) + sum(lengths[: options.rounded_prompts(decoder)])


def make_pack(
    reference: WeightReader,
    quantized: WeightReader | None,
    decoder: Decoder,
    tokenizer: Tokenizer,
    options: GoldenOptions,
    progress: Progress | None = None,
    rounding: DeviceRounding | None = None,
    threads: int | None = None,
) -> ParityPack:
    """Run the references over the golden prompts.

    Args:
        reference: the checkpoint's own weights.
        quantized: the weights the bundle computes with, dequantised; None when they are the checkpoint's own.
        decoder: the checkpoint's model.
        tokenizer: the checkpoint's tokenizer.
        options: prompts and sizes.
        progress: receiver of progress reports.
        rounding: how the device rounds activations and KV cache; None if that is not known.
        threads: CPU threads; None is one per core allowed to this process. The pack is the same for any number.

    Raises:
        ParityError: a prompt has no tokens.
    """
    import torch

    from edgelm.reference.layerwise import LayerwiseReference
    from edgelm.reference.matmul import reproducible

    model = LayerwiseReference(decoder, reference)
    options = options.resolved(decoder)
    assert options.greedy_tokens is not None
    ids = _prompt_ids(tokenizer, options, decoder.context_length)
    continued = (options.greedy_prompts or 0) if options.greedy_tokens else 0
    if rounding is not None and rounding.is_exact:
        rounding = None
    again = quantized is not None or rounding is not None
    sweeps = (options.greedy_tokens if continued else 1) + again
    bar = (progress or Silent()).task("reference", sweeps, unit="steps")
    with reproducible(threads or allowed_cores()), bar as advance:
        share = _Share(advance)
        run = _float_run(model, ids, options.greedy_tokens, continued, share)
        target = rounded = None
        if again:
            count = options.rounded_prompts(decoder)
            target, rounded = _quantized_run(decoder, reference, quantized, run, rounding, count, share)
    return ParityPack(
        prompts=_golden_prompts(options.prompts, ids, run, tokenizer),
        ids=np.concatenate(run.fed).astype(np.int32),
        top_ids=run.top_ids,
        probe_ids=run.probes,
        reference=run.record,
        quantized=target,
        tokenizer=TokenizerPrint(tokenizer.vocab_size, tokenizer.fingerprint()),
        rounded=rounded,
        made_with={"edgelm": __version__, "torch": torch.__version__, "numpy": np.__version__},
    )


def _prompt_ids(tokenizer: Tokenizer, options: GoldenOptions, context: int) -> list[NDArray[np.int64]]:
    room = min(options.max_prompt_tokens or MAX_PROMPT_TOKENS, context - (options.greedy_tokens or 0))
    if room < 1:
        raise ParityError(
            f"{options.greedy_tokens} greedy tokens leave no room for a prompt in a context of {context}: lower "
            "--greedy-tokens"
        )
    ids = []
    for prompt in options.prompts:
        tokens = np.asarray(tokenizer.encode(prompt.text)[:room], dtype=np.int64)
        if not len(tokens):
            raise ParityError(f"the parity prompt {prompt.name!r} has no tokens: leave it out")
        ids.append(tokens)
    return ids


@dataclass
class _FloatRun:
    """The float reference over all prompts and their continuations."""

    fed: list[NDArray[np.int64]]
    greedy: list[tuple[int, ...]]
    top_ids: NDArray[np.int32]
    probes: NDArray[np.int32]
    next_ids: list[NDArray[np.int64]]
    record: ReferenceRecord


def _golden_prompts(
    prompts: Sequence[Prompt], ids: Sequence[NDArray[np.int64]], run: _FloatRun, tokenizer: Tokenizer
) -> tuple[GoldenPrompt, ...]:
    golden, start = [], 0
    for prompt, tokens, fed, greedy in zip(prompts, ids, run.fed, run.greedy, strict=True):
        decoded = tokenizer.decode(tokens.tolist())
        golden.append(GoldenPrompt(prompt.name, prompt.text, decoded, start, len(tokens), greedy))
        start += len(fed)
    return tuple(golden)


def _float_run(
    model: LayerwiseReference, ids: list[NDArray[np.int64]], greedy: int, continued: int, progress: Progress
) -> _FloatRun:
    vocab = model.decoder.vocab_size
    probes = probe_ids(vocab, PROBES)
    top = min(TOP, vocab)
    # The token after each position; 0 after the text's end, where it is not used.
    next_ids = [np.append(tokens[1:], 0) for tokens in ids]
    result = model.step(ids, None, trace=True, progress=progress)
    first = _chunks(result, top, probes, next_ids)
    chunks = [[chunk] for chunk in first]
    tokens = [[int(chunk.best[-1])] for chunk in first[:continued]]
    states: list[SequenceState] = result.states[:continued]
    for _ in range(greedy - 1 if continued else 0):
        step = [np.asarray(so_far[-1:], dtype=np.int64) for so_far in tokens]
        result = model.step(step, states, trace=True, progress=progress)
        for i, chunk in enumerate(_chunks(result, top, probes, [np.zeros(1, np.int64)] * len(step))):
            chunks[i].append(chunk)
            tokens[i].append(int(chunk.best[-1]))
    continuations = [tuple(so_far) for so_far in tokens] + [()] * (len(ids) - continued)
    fed = [
        np.concatenate([prompt, np.asarray(continuation[:-1], dtype=np.int64)])
        for prompt, continuation in zip(ids, continuations, strict=True)
    ]
    flat = [chunk for sequence in chunks for chunk in sequence]
    return _FloatRun(
        fed=fed,
        greedy=continuations,
        top_ids=np.concatenate([chunk.indices for chunk in flat]).astype(np.int32),
        probes=probes,
        next_ids=[
            np.concatenate([after, np.zeros(len(sequence) - len(after), np.int64)])
            for after, sequence in zip(next_ids, fed, strict=True)
        ],
        record=_join(flat, [chunk.values for chunk in flat]),
    )


def _quantized_run(
    decoder: Decoder,
    reference: WeightReader,
    quantized: WeightReader | None,
    run: _FloatRun,
    rounding: DeviceRounding | None,
    count: int,
    progress: Progress,
) -> tuple[ReferenceRecord | None, RoundedRecord | None]:
    """Run the quantised reference over all prompts and, in the same sweep, the first `count` with device rounding.

    One sweep serves both, because reading and dequantising the weights takes most of its time. Without quantised
    weights only the rounded prompts are run.
    """
    from edgelm.reference.hooks import LaterRows
    from edgelm.reference.layerwise import LayerwiseReference

    exact = run.fed if quantized is not None else []
    fed = [*exact, *(run.fed[:count] if rounding is not None else [])]
    hooks = None
    if rounding is not None:
        hooks = LaterRows(rounding.hooks(), [len(ids) for ids in fed], len(exact))
    model = LayerwiseReference(decoder, reference if quantized is None else quantized, hooks=hooks)
    result = model.step(fed, None, trace=True, progress=progress)
    starts = np.cumsum([0, *(len(ids) for ids in run.fed)])
    wanted = [run.top_ids[start : start + len(ids)] for start, ids in zip(starts, run.fed, strict=False)]
    after = run.next_ids
    if len(fed) != len(run.fed):
        wanted, after = ([*items[: len(exact)], *items[: len(fed) - len(exact)]] for items in (wanted, after))
    chunks = _chunks(result, min(2, model.decoder.vocab_size), run.probes, after, wanted)
    assert all(chunk.extra.shape[1] == run.top_ids.shape[1] for chunk in chunks)
    plain, later = chunks[: len(exact)], chunks[len(exact) :]
    record = _join(plain, [chunk.extra for chunk in plain]) if plain else None
    if rounding is None:
        return record, None
    rounded = _join(later, [chunk.extra for chunk in later])
    rows = np.arange(len(rounded.best), dtype=np.int32)
    chosen = (run.record if record is None else record).experts
    flipped = np.zeros(len(rows), dtype=bool)
    if chosen is not None and rounded.experts is not None:
        same = np.sort(chosen[:, rows], axis=-1) == np.sort(rounded.experts, axis=-1)
        flipped = ~same.all(axis=(0, 2))
    return record, RoundedRecord(
        rows=rows,
        top_logits=rounded.top_logits,
        logsumexp=rounded.logsumexp,
        probe_logits=rounded.probe_logits,
        next_logit=rounded.next_logit,
        best=rounded.best,
        flipped=flipped.astype(np.int32),
        kv=rounding.kv,
    )


def _routed(arrays: Sequence[NDArray[Any]]) -> NDArray[Any] | None:
    return np.concatenate(arrays, axis=1) if arrays else None


class _Share(Progress):
    """Progress that counts each task as one step of an outer task: one bar for all sweeps, moving at every layer."""

    def __init__(self, advance: Advance) -> None:
        self._advance = advance

    @contextlib.contextmanager
    def task(self, label: str, total: float, *, unit: str = "bytes") -> Iterator[Advance]:
        """Yield a function that advances the outer task by the same part of one step."""
        del label, unit
        yield lambda amount: self._advance(amount / total)


@dataclass
class _Chunk:
    """Results of one sequence's new positions in one sweep, reduced to what a pack keeps. T positions, L layers."""

    values: NDArray[np.float32]  # [T, k], falling
    indices: NDArray[np.int64]  # [T, k]
    logsumexp: NDArray[np.float32]  # [T]
    probes: NDArray[np.float32]  # [T, P]
    next_logit: NDArray[np.float32]  # [T]
    extra: NDArray[np.float32]  # [T, m] at the tokens asked for
    norms: NDArray[np.float32]  # [L + 1, T]
    sketches: NDArray[np.float32]  # [L + 1, T, 64]
    router: NDArray[np.float32] | None  # [L, T, E]
    experts: NDArray[np.int64] | None  # [L, T, k]

    @property
    def best(self) -> NDArray[np.int64]:
        return self.indices[:, 0]

    @property
    def gap(self) -> NDArray[np.float32]:
        return self.values[:, 0] - self.values[:, min(1, self.values.shape[1] - 1)]


def _chunks(
    result: LayerwiseResult,
    k: int,
    probes: NDArray[np.int32],
    next_ids: Sequence[NDArray[np.int64]],
    wanted: Sequence[NDArray[np.int32]] | None = None,
) -> list[_Chunk]:
    """Reduce a sweep; one pass over the head serves the top logits, the probes, the next tokens and `wanted`."""
    import torch

    asked = []
    for i, after in enumerate(next_ids):
        columns: list[NDArray[Any]] = [np.broadcast_to(probes, (len(after), len(probes))), after[:, None]]
        if wanted is not None:
            columns.append(wanted[i])
        asked.append(np.concatenate(columns, axis=1).astype(np.int64))
    tops, gathered = result.topk(k, asked)
    assert gathered is not None
    signs = torch.from_numpy(sign_matrix(result.reference.decoder.hidden_size))
    chunks = []
    for sequence, top, found in zip(result.sequences, tops, gathered, strict=True):
        hidden = np.stack(sequence.hidden)
        assert hidden.shape[-1] == len(signs)
        assert signs.shape[1] == SKETCH_WIDTH
        chunks.append(
            _Chunk(
                values=top.values,
                indices=top.indices,
                logsumexp=top.logsumexp,
                probes=found[:, : len(probes)],
                next_logit=found[:, len(probes)],
                extra=found[:, len(probes) + 1 :],
                norms=np.linalg.norm(hidden, axis=-1).astype(np.float32),
                # PyTorch's matmul, not NumPy's, whose threads nobody counts here.
                sketches=(torch.from_numpy(hidden) @ signs).numpy(),
                router=np.stack(sequence.router_logits) if sequence.router_logits else None,
                experts=np.stack(sequence.experts) if sequence.experts else None,
            )
        )
    return chunks


def _join(chunks: Sequence[_Chunk], top_logits: Sequence[NDArray[np.float32]]) -> ReferenceRecord:
    return ReferenceRecord(
        top_logits=np.concatenate(top_logits).astype(np.float32),
        logsumexp=np.concatenate([chunk.logsumexp for chunk in chunks]).astype(np.float32),
        probe_logits=np.concatenate([chunk.probes for chunk in chunks]).astype(np.float32),
        next_logit=np.concatenate([chunk.next_logit for chunk in chunks]).astype(np.float32),
        best=np.concatenate([chunk.best for chunk in chunks]).astype(np.int32),
        gap=np.concatenate([chunk.gap for chunk in chunks]).astype(np.float32),
        norms=np.concatenate([chunk.norms for chunk in chunks], axis=1),
        sketches=np.concatenate([chunk.sketches for chunk in chunks], axis=1),
        router=_routed([chunk.router for chunk in chunks if chunk.router is not None]),
        experts=_routed([chunk.experts.astype(np.int32) for chunk in chunks if chunk.experts is not None]),
    )
