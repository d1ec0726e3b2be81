"""Does an engine give every request the tokens that it would get alone, and does it end every request once?"""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from serving_client import Asked

import edgelm
from edgelm.bundle.kv_cache import KV_TYPES
from edgelm.errors import EdgeLMError, GenerationError, QueueFullError, TimeLimitError
from edgelm.export import ExportOptions, export_bundle
from edgelm.serving import engine as engine_module
from edgelm.serving.engine import Engine, Failed, Finished

EngineOf = Callable[..., Engine]
VOCABULARY = 400
CHECKPOINTS = Path(__file__).parents[2] / "examples" / "checkpoints"


def prompts() -> list[list[int]]:
    """Prompts of many lengths. Some share a prefix, some repeat another one."""
    rng = np.random.default_rng(3)
    shared: list[int] = rng.integers(3, VOCABULARY, 200).tolist()
    own = [rng.integers(3, VOCABULARY, length).tolist() for length in (1, 5, 9, 31, 32, 33, 41, 64, 100, 260)]
    # Its second block is that of another prompt, after another first one.
    own.append([*own[9][:32][::-1], *own[9][32:100]])
    return [*own, shared, shared[:150] + own[3], shared[:96] + own[1], shared + own[4], own[8], shared[:161]]


def options(index: int) -> dict[str, Any]:
    """Greedy and sampled, long and short."""
    sampled = {"temperature": 1.3, "seed": index, "top_p": 0.9} if index % 3 else {}
    return {"max_tokens": 3 + index % 7, "logprobs": 2, **sampled}


def answers(engine: Engine, wanted: Sequence[Sequence[int]], order: Sequence[int]) -> list[Any]:
    """Ask for all at once, in this order; return tokens and log-probabilities of each."""
    asked = {index: Asked(engine, wanted[index], **options(index)) for index in order}
    for one in asked.values():
        engine.submit(one.job)
    found = []
    for index in range(len(wanted)):
        result = asked[index].result
        found.append((result.tokens, [(token.logprob, token.top) for token in asked[index].tokens]))
    return found


@pytest.mark.parametrize(("model", "recipe"), [("olmoe", "int4"), ("fox", "int8")])
@pytest.mark.parametrize("kv", KV_TYPES)
def test_do_tokens_not_depend_on_neighbours_cuts_or_cached_prefixes(
    engine_of: EngineOf, monkeypatch: pytest.MonkeyPatch, model: str, recipe: str, kv: str
) -> None:
    wanted = prompts()
    order = list(range(len(wanted)))

    def one_by_one() -> list[Any]:
        single = engine_of(model, recipe, kv=kv, slots=1, prefix_bytes=0, context_length=512)
        found = []
        for index in order:
            asked = Asked(single, wanted[index], **options(index))
            single.submit(asked.job)
            result = asked.result
            assert result.timings.reused_tokens == 0
            found.append((result.tokens, [(token.logprob, token.top) for token in asked.tokens]))
        return found

    reference = one_by_one()
    assert any(len(tokens) > 2 for tokens, _ in reference)
    for beside, slots, shuffle in [(18, 3, 1), (64, 7, 2), (1000, 16, 3)]:
        monkeypatch.setattr(engine_module, "BESIDE", beside)
        engine = engine_of(model, recipe, kv=kv, slots=slots, context_length=512)
        for again in range(2):  # the second time everything is cached
            mixed = np.random.default_rng([shuffle, again]).permutation(len(wanted)).tolist()
            assert answers(engine, wanted, mixed) == reference
        assert engine.statistics().reused_tokens > sum(map(len, wanted)) // 2


def test_is_a_head_in_split_nibbles_exact_for_one_and_for_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgelm.export.graph.native.RESCORE", 3)
    folder = tmp_path / "olmoe"
    export_bundle(CHECKPOINTS / "olmoe-tiny", folder, recipe="int4", options=ExportOptions())
    with edgelm.load(folder, threads=2, context_length=512, chat=False) as model:
        rounded = model.runtime.prefill([5, 6]).copy()
    engine = Engine(edgelm.load(folder, threads=2, context_length=512, chat=False), slots=8)
    assert engine._batch.prefill(0, [5, 6]).tobytes() != rounded.tobytes()
    one_by_one = []
    for index, prompt in enumerate(prompts()):
        asked = Asked(engine, prompt, **options(index))
        engine.submit(asked.job)
        one_by_one.append((asked.result.tokens, [(token.logprob, token.top) for token in asked.tokens]))
    assert answers(engine, prompts(), range(len(prompts()))) == one_by_one
    engine.close()


def test_is_a_shared_prefix_computed_once(engine_of: EngineOf) -> None:
    engine = engine_of(context_length=512)
    shared = prompts()[11]
    asked = [Asked(engine, [*shared, 5 + index], max_tokens=2) for index in range(4)]
    for one in asked:
        engine.submit(one.job)
    reused = [one.result.timings.reused_tokens for one in asked]
    assert reused == [0, 192, 192, 192]
    statistics = engine.statistics()
    assert (statistics.prompt_tokens, statistics.reused_tokens) == (4 * 201, 3 * 192)
    assert statistics.finished == 4
    assert engine.idle


def test_does_the_prefix_cache_keep_to_its_memory(engine_of: EngineOf) -> None:
    block = engine_of()._batch.copied_bytes(32)
    # Of a path that is too long its beginning is kept, and of an old one its end is forgotten first.
    small = [(9, 0), (9, 96), (11, 0), (11, 96), (9, 0), (0, 0), (9, 96)]
    for blocks, order in [(3, small), (8, [(9, 0), (7, 0), (9, 192)])]:
        engine = engine_of(context_length=512, prefix_bytes=blocks * block)
        for index, reused in order:
            asked = Asked(engine, prompts()[index], max_tokens=1)
            engine.submit(asked.job)
            assert asked.result.timings.reused_tokens == reused
            assert engine.statistics().prefix_bytes <= blocks * block


def test_do_others_decode_while_a_long_prompt_is_prefilled(
    engine_of: EngineOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "BESIDE", 20)
    engine = engine_of(slots=2, context_length=512, prefix_bytes=0)
    running = Asked(engine, [5, 6, 7], max_tokens=400)
    seen: list[str] = []
    running.job._notify = lambda event: (seen.append("running"), running.events.put(event))[1]
    engine.submit(running.job)
    running.events.get(timeout=60)
    long = Asked(engine, prompts()[9], max_tokens=1)
    long.job._notify = lambda event: (seen.append("long"), long.events.put(event))[1]
    before = len(seen)
    engine.submit(long.job)
    assert len(long.result.tokens) == 1
    # 260 tokens, 20 at a time: 13 steps, each with one token of the other sequence.
    assert seen.index("long") - before >= 12
    engine.cancel(running.job)
    running.end()


def test_do_clients_take_turns(engine_of: EngineOf) -> None:
    engine = engine_of(slots=1)
    order: list[str] = []
    asked = []
    first = Asked(engine, [5] * 300, max_tokens=30, client="first")
    engine.submit(first.job)
    while not engine.statistics().running:
        time.sleep(0.001)
    for name in ("greedy 1", "greedy 2", "greedy 3", "modest 1"):
        one = Asked(engine, [7, 8], max_tokens=1, client=name.split()[0])
        one.job._notify = lambda event, one=one, name=name: (  # type: ignore[misc]
            order.append(name) if isinstance(event, Finished) else None,
            one.events.put(event),
        )
        engine.submit(one.job)
        asked.append(one)
    for one in asked:
        one.end()
    assert order == ["greedy 1", "modest 1", "greedy 2", "greedy 3"]


def test_is_a_job_that_is_cancelled_ended_and_its_place_given_to_the_next(engine_of: EngineOf) -> None:
    engine = engine_of(slots=1)
    running, waiting, last = (Asked(engine, [5, 6], max_tokens=None) for _ in range(3))
    for one in (running, waiting, last):
        engine.submit(one.job)
    running.events.get(timeout=60)
    engine.cancel(waiting.job)
    ended = waiting.end()
    assert isinstance(ended, Finished)
    assert (ended.generation.stop_reason, ended.generation.tokens) == ("interrupted", ())
    engine.cancel(running.job)
    ended = running.end()
    assert isinstance(ended, Finished)
    assert ended.generation.stop_reason == "interrupted"
    assert len(ended.generation.tokens) >= 1
    engine.cancel(running.job)  # again: nothing happens
    assert last.result.stop_reason in ("eos", "length")


def test_are_limits_kept(engine_of: EngineOf) -> None:
    engine = engine_of(slots=1, queue=1)
    running = Asked(engine, [5, 6], max_tokens=None, deadline=time.monotonic() + 0.3)
    engine.submit(running.job)
    running.events.get(timeout=60)
    waiting = Asked(engine, [5, 6], max_tokens=1, deadline=time.monotonic() - 1)
    late = Asked(engine, [5, 6], max_tokens=1)
    engine.submit(late.job)
    with pytest.raises(QueueFullError, match="1 requests wait already: ask again later"):
        engine.submit(waiting.job)
    assert late.result.stop_reason == "length" or late.result
    ended = running.end()
    assert isinstance(ended, (Finished, Failed))
    if isinstance(ended, Failed):
        assert isinstance(ended.error, TimeLimitError)
    engine.submit(waiting.job)
    failed = waiting.end()
    assert isinstance(failed, Failed)
    assert str(failed.error) == "the request took longer than this server allows: ask for fewer tokens"


class OnlyToken:
    """A rule that allows one token, and after it fails or not."""

    def __init__(self, token: int, fails: bool) -> None:
        self.token, self.fails = token, fails
        self.accepted: list[int] = []

    def apply(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        if self.accepted and self.fails:
            raise GenerationError("the rule fails")
        changed = np.full_like(logits, -np.inf)
        changed[self.token] = 1
        return changed

    def accept(self, token: int) -> None:
        self.accepted.append(token)


def test_do_rules_change_only_their_own_sequence(engine_of: EngineOf) -> None:
    engine = engine_of(slots=3)
    free = Asked(engine, [5, 6], max_tokens=6)
    engine.submit(free.job)
    expected = free.result.tokens
    rule, failing = OnlyToken(77, False), OnlyToken(78, True)
    asked = [
        Asked(engine, [5, 6], max_tokens=6),
        Asked(engine, [5, 6], max_tokens=6, rules=[rule]),
        Asked(engine, [5, 6], max_tokens=6, rules=[failing]),
    ]
    for one in asked:
        engine.submit(one.job)
    assert asked[0].result.tokens == expected
    assert asked[1].result.tokens == (77,) * 6
    assert rule.accepted == [77] * 6
    with pytest.raises(GenerationError, match="the rule fails"):
        asked[2].result  # noqa: B018 - raises
    assert failing.accepted == [78]


def test_does_the_engine_survive_an_error_of_the_model(engine_of: EngineOf, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(slots=2)
    decode = engine._batch.decode_batch
    errors: list[Exception] = [EdgeLMError("no memory"), ZeroDivisionError("/secret/path")]
    for error, message in zip(errors, ("no memory", "unexpected ZeroDivisionError while generating"), strict=True):

        def failing(tokens: Any, error: Exception = error) -> Any:
            raise error

        monkeypatch.setattr(engine._batch, "decode_batch", failing)
        asked = [Asked(engine, [5, 6], max_tokens=5) for _ in range(2)]
        for one in asked:
            engine.submit(one.job)
        ends = [one.end() for one in asked]
        assert [str(end.error) for end in ends if isinstance(end, Failed)] == [message] * 2
        monkeypatch.setattr(engine._batch, "decode_batch", decode)
    again = Asked(engine, [5, 6], max_tokens=5)
    engine.submit(again.job)
    assert len(again.result.tokens) >= 1


def test_does_closing_finish_or_fail_every_job(engine_of: EngineOf) -> None:
    engine = engine_of(slots=1)
    asked = [Asked(engine, [5, 6], max_tokens=4) for _ in range(3)]
    for one in asked:
        engine.submit(one.job)
    engine.close(finish_seconds=60)
    assert all(isinstance(one.end(), Finished) for one in asked)
    with pytest.raises(EdgeLMError, match="the model is being unloaded: ask again later"):
        engine.submit(asked[0].job)
    engine = engine_of(slots=1)
    asked = [Asked(engine, [5, 6], max_tokens=None) for _ in range(3)]
    for one in asked:
        engine.submit(one.job)
    engine.close()
    ends = [one.end() for one in asked]
    assert any(isinstance(end, Failed) and "the server is stopping" in str(end.error) for end in ends)


def test_does_a_bundle_without_batches_run_too(engine_of: EngineOf) -> None:
    engine = engine_of(ops="portable", slots=8)
    assert engine.slots == 1
    asked = [Asked(engine, prompt, max_tokens=4) for prompt in prompts()[:3]]
    for one in asked:
        engine.submit(one.job)
    found = [one.result.tokens for one in asked]
    assert found == [engine_of(ops="portable").model.generate(prompt, max_tokens=4).tokens for prompt in prompts()[:3]]


def test_is_an_answer_that_of_generate(engine_of: EngineOf) -> None:
    engine = engine_of(slots=4)
    model = engine_of().model
    texts = ["Once upon a time", "import os\n", "The"]
    asked = [Asked(engine, model.tokenizer.encode(text), max_tokens=20, stop=["e"]) for text in texts]
    for one in asked:
        engine.submit(one.job)
    for one, text in zip(asked, texts, strict=True):
        found, expected = one.result, model.generate(text, max_tokens=20, stop=["e"])
        assert (found.text, found.tokens, found.stop_reason) == (expected.text, expected.tokens, expected.stop_reason)
        assert "".join(token.text for token in one.tokens) == expected.text


def test_is_what_belongs_to_a_job_freed_without_the_garbage_collector(engine_of: EngineOf) -> None:
    engine = engine_of(slots=2)
    gc.collect()
    gc.disable()
    try:
        asked: list[Asked] = [Asked(engine, [5, 6], max_tokens=3) for _ in range(3)]
        kept = [weakref.ref(one.job) for one in asked] + [weakref.ref(one.job._sequence) for one in asked]
        engine.cancel(asked[1].job)
        for one in asked:
            engine.submit(one.job)
        for one in asked:
            one.end()
        asked.clear()
        del one
        last = Asked(engine, [5, 6], max_tokens=3)  # the engine's thread forgets the others meanwhile
        engine.submit(last.job)
        last.end()
        assert [reference() for reference in kept] == [None] * 6
    finally:
        gc.enable()


def test_may_many_threads_use_an_engine(engine_of: EngineOf) -> None:
    engine = engine_of(slots=4, queue=1000)
    counts: list[int] = []

    def client(number: int) -> None:
        for index in range(5):
            asked = Asked(engine, [5 + number, 6 + index], max_tokens=3, client=str(number))
            engine.submit(asked.job)
            if (number + index) % 3 == 0:
                engine.cancel(asked.job)
            counts.append(isinstance(asked.end(), Finished))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == [True] * 40
    assert engine.statistics().finished == 40
    assert engine.idle
