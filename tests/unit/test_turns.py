"""Do calls of many threads use a model one at a time, and does no call wait for itself?"""

from __future__ import annotations

import contextvars
import gc
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from scripted_model import Scripted, scripted
from tiny_graph import write_tiny_model

from edgelm.bundle import Bundle
from edgelm.errors import EdgeLMError, GenerationError
from edgelm.generation.language_model import LanguageModel, load
from edgelm.generation.stream import TextStream

SOON = 30.0
"""Time limit in seconds of waits that should end at once."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "bundle", eos_ids=(2,))


class Gate:
    """Blocks a scripted model's steps, and lets them pass one by one."""

    def __init__(self, model: LanguageModel) -> None:
        assert isinstance(model.runtime, Scripted)
        self.reached, self._open = threading.Semaphore(0), threading.Semaphore(0)
        model.runtime.before_step = self._pass

    def _pass(self) -> None:
        self.reached.release()
        assert self._open.acquire(timeout=SOON)

    def wait(self) -> None:
        """Wait until a step has begun."""
        assert self.reached.acquire(timeout=SOON)

    def open(self, steps: int = 1000) -> None:
        self._open.release(steps)


def in_thread(work: Callable[[], Any]) -> Future[Any]:
    """Run `work` in a new thread."""
    with_one = ThreadPoolExecutor(1)
    future = with_one.submit(work)
    with_one.shutdown(wait=False)
    return future


def wait_for_queue(model: LanguageModel, length: int) -> None:
    """Wait until `length` calls are in the queue."""
    end = time.monotonic() + SOON
    while len(model._turns._queue) != length:
        assert time.monotonic() < end
        time.sleep(0.001)


def test_calls_of_many_threads_give_the_same_results_as_alone(bundle: Bundle) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    calls: list[Callable[[LanguageModel], Any]] = [
        lambda model: model.generate("one prompt", max_tokens=20).tokens,
        lambda model: model.generate([5, 6, 7], max_tokens=15, temperature=1.3, seed=4).tokens,
        lambda model: "".join(model.stream("another", max_tokens=12, temperature=0.9, seed=2**40)),
        lambda model: model.chat(messages, max_tokens=9).tokens,
        lambda model: "".join(model.chat_stream(messages, max_tokens=11, temperature=2.0, seed=1)),
    ]
    alone = []
    for call in calls:
        with load(bundle.path, threads=1) as fresh:
            alone.append(call(fresh))
    with load(bundle.path, threads=1) as model, ThreadPoolExecutor(10) as pool:
        found = [pool.submit(call, model) for _ in range(4) for call in calls]
        assert [future.result(SOON) for future in found] == alone * 4


def test_calls_run_in_the_order_of_arrival(bundle: Bundle) -> None:
    model = scripted(bundle, "abc")
    gate = Gate(model)
    first = in_thread(lambda: model.generate("x"))
    gate.wait()
    others = []
    for number in range(5):
        others.append(in_thread(lambda n=number: model.generate([10 + n])))  # type: ignore[misc]
        wait_for_queue(model, number + 2)
    gate.open()
    assert [future.result(SOON).text for future in [first, *others]] == ["abc"] * 6
    assert isinstance(model.runtime, Scripted)
    assert [token for token in model.runtime.fed if 10 <= token < 15] == [10, 11, 12, 13, 14]


def finish(stream: TextStream) -> None:
    assert "".join(stream) == "bc"


def collect_cycle(stream: TextStream) -> None:
    """Leave the stream in a reference cycle only; the test's own reference ends with its frame."""
    cycle: list[Any] = [stream]
    cycle.append(cycle)


@pytest.mark.parametrize("end", [finish, TextStream.close, collect_cycle])
def test_a_second_call_of_the_same_thread_is_refused_until_the_stream_ends(
    bundle: Bundle, end: Callable[[TextStream], None]
) -> None:
    model = scripted(bundle, "abc")
    streams = [model.stream("x")]
    assert next(streams[0]) == "a"
    for call in (
        lambda: model.generate("x"),
        lambda: next(model.stream("x")),
        lambda: model.generate_many(["x"]),
        lambda: model.generate_many(["x", "x"]),
    ):
        with pytest.raises(GenerationError, match="open in this thread: exhaust it, or close"):
            call()
    gc.disable()  # so that the refused call has to collect garbage itself
    try:
        end(streams.pop())
        assert model.generate("x").text == "abc"
    finally:
        gc.enable()


def test_an_abandoned_stream_releases_the_model(bundle: Bundle) -> None:
    model = scripted(bundle, "abc")
    for _ in model.stream("x"):
        break
    assert model.generate("x").text == "abc"
    never_begun = model.stream("x")
    assert model.generate("x").text == "abc"
    assert list(never_begun) == ["a", "b", "c"]


def test_the_last_text_ends_a_stream(bundle: Bundle) -> None:
    model = scripted(bundle, "abc")
    stream = model.stream("x", max_tokens=2)
    assert [next(stream), next(stream)] == ["a", "b"]
    assert stream.generation.stop_reason == "length"
    assert model.generate("x").text == "abc"


def test_other_threads_wait_for_an_open_stream(bundle: Bundle) -> None:
    model = scripted(bundle, "abc")
    stream = model.stream("x")
    assert next(stream) == "a"
    waiting = in_thread(lambda: model.generate("x"))
    wait_for_queue(model, 2)
    assert not waiting.done()
    assert list(stream) == ["b", "c"]
    assert waiting.result(SOON).text == "abc"


def test_streams_computed_by_a_thread_pool_wait_for_each_other(bundle: Bundle) -> None:
    # As web frameworks do: every text in any thread, in a copy of the request's context.
    model = scripted(bundle, "abc")
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:

        def piece(pool: ThreadPoolExecutor, stream: TextStream) -> Future[str]:
            return pool.submit(contextvars.copy_context().run, next, stream, "end")

        first, second = model.stream("x"), model.stream("x")
        assert piece(one, first).result(SOON) == "a"
        waiting = piece(one, second)
        wait_for_queue(model, 2)
        assert [piece(other, first).result(SOON) for _ in range(3)] == ["b", "c", "end"]
        assert waiting.result(SOON) == "a"
        # In the thread's own context, no other caller can continue the stream.
        second.close()
        third = model.stream("x")
        assert one.submit(next, third).result(SOON) == "a"
        with pytest.raises(GenerationError, match="open in this thread"):
            one.submit(model.generate, "x").result(SOON)
        third.close()


def test_closing_the_model_ends_running_and_waiting_calls(bundle: Bundle) -> None:
    model = scripted(bundle, "abc")
    gate = Gate(model)
    running = in_thread(lambda: model.generate("x"))
    gate.wait()
    waiting = in_thread(lambda: model.generate("x"))
    wait_for_queue(model, 2)
    closing = in_thread(model.close)
    with pytest.raises(EdgeLMError, match="this model was closed"):
        waiting.result(SOON)
    assert not closing.done()
    gate.open(1)
    closing.result(SOON)
    with pytest.raises(EdgeLMError, match="this model was closed"):
        running.result(SOON)
    assert isinstance(model.runtime, Scripted)
    assert model.runtime.fed == model.tokenizer.encode("x")
    model.close()


def test_closing_the_model_does_not_wait_for_an_open_stream(bundle: Bundle) -> None:
    with scripted(bundle, "abc") as model:
        stream = model.stream("x")
        assert next(stream) == "a"
    with pytest.raises(EdgeLMError, match="this model was closed: load the bundle again"):
        next(stream)
    for call in (lambda: model.stream("x"), lambda: model.generate_many(["x", "x"])):
        with pytest.raises(EdgeLMError, match="this model was closed"):
            call()


def test_another_thread_may_close_a_running_or_waiting_stream(bundle: Bundle) -> None:
    model = scripted(bundle, "abc")
    gate = Gate(model)
    first, second = model.stream("x"), model.stream("x")
    computing = in_thread(lambda: list(first))
    gate.wait()
    waiting = in_thread(lambda: list(second))
    wait_for_queue(model, 2)
    second.close()
    assert waiting.result(SOON) == []
    closing = in_thread(first.close)
    while not first._turn._left:
        time.sleep(0.001)
    gate.open()
    closing.result(SOON)
    assert computing.result(SOON) in ([], ["a"])
    assert first.generation.stop_reason == second.generation.stop_reason == "interrupted"
    assert model.generate("x").text == "abc"


def test_a_signal_handler_may_only_close_the_stream_it_interrupts(bundle: Bundle) -> None:
    model = scripted(bundle, "abc")
    assert isinstance(model.runtime, Scripted)
    refused = []

    def handler() -> None:
        if model.runtime.position != 1:  # before it computes "b"
            return
        stream.close()
        for call in (model.close, lambda: next(stream), lambda: model.generate("x")):
            try:
                call()
            except EdgeLMError as error:
                refused.append(str(error))

    model.runtime.before_step = handler
    stream = model.stream("x")
    assert list(stream) == ["a", "b"]
    assert [said.partition(":")[0] for said in refused] == [
        "this model is generating in this thread",
        "this stream is being read already",
        "a stream of this model is open in this thread",
    ]


def test_with_many_threads_only_one_stream_computes_at_a_time(bundle: Bundle) -> None:
    model = scripted(bundle, "abcdefgh")
    assert isinstance(model.runtime, Scripted)
    alone, together = threading.Lock(), []

    def step() -> None:
        if not alone.acquire(blocking=False):
            together.append(threading.get_ident())
            return
        time.sleep(0)
        alone.release()

    model.runtime.before_step = step

    def work(seed: int) -> int:
        rng, whole = random.Random(seed), 0
        for _ in range(25):
            stream = model.stream("x")
            match rng.randrange(5):
                case 0:
                    whole += "".join(stream) == "abcdefgh"
                case 1:
                    whole += model.generate("x").text == "abcdefgh"
                case 2:
                    next(stream)
                    stream.close()
                case 3:
                    closing = in_thread(stream.close)
                    assert "abcdefgh".startswith("".join(stream))
                    closing.result(SOON)
                case 4:
                    next(stream)
                    del stream
        return whole

    futures = [in_thread(lambda s=seed: work(s)) for seed in range(8)]  # type: ignore[misc]
    assert sum(future.result(SOON) for future in futures) > 50
    assert together == []
    assert len(model._turns._queue) == 0
