"""Does the layer-by-layer reference compute the same as the whole model in memory?"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from edgelm.errors import ContextLengthError
from edgelm.models import decoder as decoder_of
from edgelm.progress import Advance, Progress
from edgelm.reference import layerwise
from edgelm.reference.kv_cache import Trace
from edgelm.reference.layerwise import LayerwiseReference
from edgelm.reference.module import ReferenceModel

OLMOE: dict[str, Any] = {
    "architectures": ["OlmoeForCausalLM"],
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 40,
}
FOX: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 103,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "tie_word_embeddings": True,
    "max_position_embeddings": 40,
}


class Weights:
    """Random tensors in memory that record which parts were read."""

    def __init__(self, config_json: dict[str, Any]) -> None:
        generator = np.random.default_rng(0)
        self.tensors = {
            name: generator.standard_normal(shape, dtype=np.float32) * (0.3 if len(shape) > 1 else 1)
            for name, shape in decoder_of(config_json).tensor_shapes.items()
        }
        self.reads: list[tuple[str, slice | None]] = []

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def read_float32(self, name: str, rows: slice | None = None) -> np.ndarray:
        self.reads.append((name, rows))
        return self.tensors[name].copy() if rows is None else self.tensors[name][rows].copy()


def whole_model(config_json: dict[str, Any], weights: Weights) -> torch.nn.Module:
    model: torch.nn.Module = ReferenceModel(decoder_of(config_json))
    model.load_weights(lambda name: weights.tensors[name])  # type: ignore[operator]
    return model


def relative(got: np.ndarray, expected: torch.Tensor) -> float:
    expected_array = expected.detach().numpy()
    assert got.shape == expected_array.shape
    return float(np.linalg.norm(got - expected_array) / np.linalg.norm(expected_array))


@pytest.fixture(
    params=[OLMOE, {**OLMOE, "tie_word_embeddings": True, "norm_topk_prob": True}, FOX],
    ids=["olmoe", "olmoe-tied", "fox"],
)
def config_json(request: pytest.FixtureRequest) -> dict[str, Any]:
    config: dict[str, Any] = request.param
    return config


SEQUENCES = [np.array([3, 1, 4, 1, 5, 9, 2]), np.array([6]), np.array([5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8])]


def test_one_run_over_several_sequences_equals_the_whole_model(config_json: dict[str, Any]) -> None:
    weights = Weights(config_json)
    model = whole_model(config_json, weights)
    # Blocks of a few rows, so that the head consists of several.
    result = LayerwiseReference(decoder_of(config_json), weights, head_block_bytes=10 * 4 * 32).step(
        SEQUENCES, trace=True
    )
    wanted = [np.stack([s, (s * 7 + 50) % 101, np.full(len(s), 100)], 1) for s in SEQUENCES]
    tops, gathered = result.topk(9, wanted)
    assert gathered is not None
    blocks = [np.concatenate(parts, -1) for parts in zip(*(logits for _, logits in result.logits()), strict=True)]
    for i, ids in enumerate(SEQUENCES):
        trace = Trace()
        with torch.no_grad():
            logits = model(torch.from_numpy(ids)[None], trace=trace)[0]
        assert relative(blocks[i], logits) < 1e-5
        values, indices = logits.topk(9)
        assert relative(tops[i].values, values) < 1e-5
        assert np.array_equal(tops[i].indices, indices)
        assert relative(tops[i].logsumexp, logits.logsumexp(-1)) < 1e-5
        assert relative(gathered[i], logits.gather(-1, torch.from_numpy(wanted[i]))) < 1e-5
        sequence = result.sequences[i]
        assert len(sequence.hidden) == model.decoder.num_layers + 1  # type: ignore[union-attr]
        for got, expected in zip(sequence.hidden, trace.hidden, strict=True):
            assert relative(got, expected[0]) < 1e-5
        if not trace.experts:
            assert sequence.router_logits is sequence.experts is sequence.expert_weights is None
            continue
        assert sequence.router_logits is not None
        assert sequence.experts is not None
        assert sequence.expert_weights is not None
        for layer, experts in enumerate(trace.experts):
            assert np.array_equal(sequence.experts[layer], experts[0])
            assert relative(sequence.router_logits[layer], trace.router_logits[layer][0]) < 1e-5
            assert relative(sequence.expert_weights[layer], trace.expert_weights[layer][0]) < 1e-5
            assert (np.diff(sequence.expert_weights[layer], axis=-1) <= 0).all()


@pytest.mark.parametrize("window_bytes", [1, 1 << 30], ids=["one at a time", "all together"])
def test_windows_in_one_run_equal_separate_sequences(
    config_json: dict[str, Any], window_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layerwise, "WINDOW_BYTES", window_bytes)
    reference = LayerwiseReference(decoder_of(config_json), Weights(config_json))
    ids = np.arange(3 * 9).reshape(3, 9) * 7 % 101
    expected = reference.step(list(ids), trace=True).sequences
    hidden: dict[tuple[int, int], np.ndarray] = {}
    experts: dict[tuple[int, int], np.ndarray] = {}
    together: set[int] = set()

    def visit(layer: int, first: int, x: torch.Tensor, inputs: torch.Tensor | None, trace: Trace) -> None:
        assert (inputs is None) == (layer < 0)
        assert inputs is None or inputs.shape == x.shape
        together.add(len(x))
        for i in range(len(x)):
            hidden[layer, first + i] = x[i].numpy().copy()
            if trace.experts:
                experts[layer, first + i] = trace.experts[0][i].numpy().copy()

    final = reference.windows(ids, visit)
    # As many windows at a time as fit into that memory, at least one.
    assert max(together) == min(len(ids), max(1, window_bytes // (ids.shape[1] * reference._bytes_per_token())))
    for i, sequence in enumerate(expected):
        assert relative(final[i], torch.from_numpy(sequence.final)) < 1e-5
        for layer, residual in enumerate(sequence.hidden, -1):
            assert relative(hidden[layer, i], torch.from_numpy(residual)) < 1e-5
        for layer, chosen in enumerate(sequence.experts or []):
            assert np.array_equal(experts[layer, i], chosen)


def test_continuing_with_states_equals_one_long_sequence(config_json: dict[str, Any]) -> None:
    weights = Weights(config_json)
    reference = LayerwiseReference(decoder_of(config_json), weights)
    whole = reference.step(SEQUENCES)
    states = [reference.new_state() for _ in (0, 2)]
    finals: list[list[np.ndarray]] = [[], []]
    for start, end in ((0, 3), (3, 4), (4, 5), (5, None)):  # prompt, two single tokens, the uneven rest
        result = reference.step([SEQUENCES[0][start:end], SEQUENCES[2][start:end]], states)
        states = result.states
        for kept, sequence in zip(finals, result.sequences, strict=True):
            kept.append(sequence.final)
    for kept, i in zip(finals, (0, 2), strict=True):
        assert relative(np.concatenate(kept), torch.from_numpy(whole.sequences[i].final)) < 1e-5
    assert [state.length for state in states] == [7, 11]


def test_a_truncated_state_continues_from_the_remaining_tokens(config_json: dict[str, Any]) -> None:
    reference = LayerwiseReference(decoder_of(config_json), Weights(config_json))
    result = reference.step([SEQUENCES[2]])
    result.states[0].truncate(4)
    again = reference.step([SEQUENCES[2][4:]], result.states)
    assert relative(again.sequences[0].final, torch.from_numpy(result.sequences[0].final[4:])) < 1e-5


def test_only_the_needed_tensors_are_read() -> None:
    weights = Weights(OLMOE)
    reference = LayerwiseReference(decoder_of(OLMOE), weights, head_block_bytes=16 * 4 * 32)
    result = reference.step([np.array([7, 7, 9])], trace=True)
    chosen = result.sequences[0].experts
    assert chosen is not None
    assert any(len(np.unique(experts)) < 8 for experts in chosen), "this case needs an expert that is not selected"
    names = [name for name, _ in weights.reads]
    for layer, experts in enumerate(chosen):
        read = {int(name.split(".")[5]) for name in names if name.startswith(f"model.layers.{layer}.mlp.experts.")}
        assert read == set(np.unique(experts).tolist())
    whole_layer = [name for name in names if name.startswith("model.layers.")]
    assert len(whole_layer) == len(set(whole_layer)), "a tensor was read twice in one run"
    embedding = [rows for name, rows in weights.reads if name == "model.embed_tokens.weight"]
    assert sorted((rows.start, rows.stop) for rows in embedding if rows is not None) == [(7, 8), (9, 10)]
    assert "lm_head.weight" not in names
    result.topk(3)
    head = [rows for name, rows in weights.reads if name == "lm_head.weight"]
    assert [(rows.start, rows.stop) for rows in head if rows is not None][-2:] == [(80, 96), (96, 101)]
    assert len(head) == 7


def test_top_k_may_exceed_a_head_block_and_equal_the_vocabulary() -> None:
    reference = LayerwiseReference(decoder_of(FOX), Weights(FOX), head_block_bytes=1)  # one row per block
    result = reference.step([SEQUENCES[0]])
    tops, gathered = result.topk(103)
    assert gathered is None
    assert np.array_equal(np.sort(tops[0].indices), np.tile(np.arange(103), (7, 1)))
    log_probabilities = tops[0].values - tops[0].logsumexp[:, None]
    assert np.allclose(np.exp(log_probabilities).sum(-1), 1, atol=1e-5)


def test_gather_accepts_different_widths() -> None:
    reference = LayerwiseReference(decoder_of(FOX), Weights(FOX))
    result = reference.step(SEQUENCES[:2])
    (full,) = [logits for _, logits in result.logits()]
    all_columns, one_column = result.gather([np.tile([[5, 102, 0]], (7, 1)), np.array([[44]])])
    assert np.array_equal(all_columns, full[0][:, [5, 102, 0]])
    assert np.array_equal(one_column, full[1][:, [44]])


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "0 sequences"),
        ([np.array([], np.int64)], "sequence 0 has the shape"),
        ([np.array([1]), np.array([101])], "sequence 1 has a token outside"),
        ([np.array([-1])], "outside"),
    ],
)
def test_unusable_tokens_are_refused(ids: list[np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LayerwiseReference(decoder_of(OLMOE), Weights(OLMOE)).step(ids)


def test_exceeding_the_context_is_refused_before_any_work() -> None:
    weights = Weights(OLMOE)
    reference = LayerwiseReference(decoder_of(OLMOE), weights)
    states = reference.step([np.arange(39)]).states
    weights.reads.clear()
    with pytest.raises(ContextLengthError, match=r"41 tokens.*40"):
        reference.step([np.array([1, 2])], states)
    assert not weights.reads
    assert states[0].length == 39


def test_a_run_that_cannot_read_leaves_the_states_unchanged() -> None:
    weights = Weights(OLMOE)
    reference = LayerwiseReference(decoder_of(OLMOE), weights)
    expected = reference.step([SEQUENCES[0]]).sequences[0].final[3:]
    states = reference.step([SEQUENCES[0][:3]]).states
    lost = weights.tensors.pop("model.layers.2.input_layernorm.weight")
    with pytest.raises(KeyError):
        reference.step([SEQUENCES[0][3:]], states)
    weights.tensors["model.layers.2.input_layernorm.weight"] = lost
    assert states[0].length == 3
    again = reference.step([SEQUENCES[0][3:]], states).sequences[0].final
    assert relative(again, torch.from_numpy(expected)) < 1e-5


def test_progress_is_reported_for_every_layer() -> None:
    told: list[tuple[str, float]] = []

    class Told(Progress):
        @contextlib.contextmanager
        def task(self, label: str, total: float, *, unit: str = "bytes") -> Iterator[Advance]:
            told.append((unit, total))
            yield lambda amount: told.append(("done", amount))

    LayerwiseReference(decoder_of(FOX), Weights(FOX)).step([SEQUENCES[0]], progress=Told())
    assert told == [("steps", 3), *[("done", 1)] * 3]


def test_invalid_requests_for_logits_are_refused() -> None:
    result = LayerwiseReference(decoder_of(OLMOE), Weights(OLMOE)).step([np.array([1, 2])])
    with pytest.raises(ValueError, match="k is 102"):
        result.topk(102)
    with pytest.raises(ValueError, match=r"shape \(1, 1\); expected \[2, m\]"):
        result.gather([np.array([[1]])])
