"""Does `async for` keep the event loop free, and does a cancelled task release the model?"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

import pytest
from scripted_model import Scripted, scripted
from tiny_graph import write_tiny_model

from edgelm.bundle import Bundle
from edgelm.errors import EdgeLMError, GenerationError, GenerationTypeError
from edgelm.generation.language_model import LanguageModel, load
from edgelm.generation.stream import TextStream

SOON = 30.0
"""Time limit in seconds of waits that should end at once."""
Result = TypeVar("Result")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "bundle", eos_ids=(2,))


def run(work: Coroutine[Any, Any, Result]) -> Result:
    async def in_time() -> Result:
        return await asyncio.wait_for(work, SOON)

    return asyncio.run(in_time())


class Gate:
    """Blocks a scripted model's steps in their thread until the event loop opens it."""

    def __init__(self, model: LanguageModel) -> None:
        assert isinstance(model.runtime, Scripted)
        self.runtime = model.runtime
        self._loop = asyncio.get_running_loop()
        self.reached = asyncio.Semaphore(0)
        self._open = threading.Semaphore(0)
        model.runtime.before_step = self._pass

    def _pass(self) -> None:
        self._loop.call_soon_threadsafe(self.reached.release)
        assert self._open.acquire(timeout=SOON)

    def open(self, steps: int = 1000) -> None:
        self._open.release(steps)


async def pieces(stream: TextStream) -> list[str]:
    return [piece async for piece in stream]


async def in_queue(model: LanguageModel, length: int) -> None:
    while len(model._turns._queue) != length:
        await asyncio.sleep(0.001)


def test_async_for_gives_the_same_texts_and_the_loop_is_not_blocked(bundle: Bundle) -> None:
    async def work() -> None:
        model = scripted(bundle, "hello")
        gate, opened = Gate(model), 0
        task = asyncio.create_task(pieces(model.stream("x")))
        while opened < 6:  # reached only if the event loop is not blocked
            await gate.reached.acquire()
            gate.open(1)
            opened += 1
        assert await task == ["h", "e", "l", "l", "o"]
        gate.open()
        generation = await model.generate_async("x", max_tokens=3)
        assert (generation.text, generation.stop_reason) == ("hel", "length")

    run(work())


def test_many_tasks_get_the_same_results_as_alone(bundle: Bundle) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    count = 40  # more than asyncio's pool has threads
    with load(bundle.path, threads=1) as model:
        alone = [model.generate([5 + i], max_tokens=6, temperature=1.1, seed=i).text for i in range(count)]
        answer = model.chat(messages, max_tokens=5).text

        async def streamed(i: int) -> str:
            return "".join(await pieces(model.stream([5 + i], max_tokens=6, temperature=1.1, seed=i)))

        async def work() -> list[str]:
            chats = [model.chat_async(messages, max_tokens=5), model.generate_async([5], max_tokens=6)]
            found = await asyncio.gather(*(streamed(i) for i in range(count)), *chats)
            return [one if isinstance(one, str) else one.text for one in found]

        found = run(work())
        assert found == [*alone, answer, model.generate([5], max_tokens=6).text]


@pytest.mark.parametrize("kind", ["stream", "generate"])
def test_cancelling_a_task_that_computes_frees_the_model(bundle: Bundle, kind: str) -> None:
    async def work() -> None:
        model = scripted(bundle, "hello")
        gate = Gate(model)
        stream = model.stream("x")
        task: asyncio.Task[Any] = asyncio.create_task(pieces(stream) if kind == "stream" else model.generate_async("x"))
        await gate.reached.acquire()
        gate.open(1)
        await gate.reached.acquire()
        waiting = asyncio.create_task(model.generate_async("x"))
        await in_queue(model, 2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        # The running step is not aborted: the next call waits for its end.
        await in_queue(model, 2)
        gate.open()
        assert (await waiting).text == "hello"
        if kind == "stream":
            assert (stream.generation.text, stream.generation.stop_reason) == ("he", "interrupted")
            assert await pieces(stream) == []
        await in_queue(model, 0)

    run(work())


def test_cancelling_a_task_that_waits_leaves_the_queue(bundle: Bundle) -> None:
    async def work() -> None:
        model = scripted(bundle, "hello")
        stream = model.stream("x")
        assert await anext(stream) == "h"

        async def wait() -> None:
            await model.generate_async("x")

        waiting = asyncio.create_task(wait())
        await in_queue(model, 2)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await in_queue(model, 1)
        assert await pieces(stream) == ["e", "l", "l", "o"]

    run(work())


def test_a_long_prompt_is_cancelled_between_its_chunks(bundle: Bundle) -> None:
    async def work() -> None:
        model = scripted(bundle, "hello")
        gate = Gate(model)
        model.runtime.chunk = 4
        task = asyncio.create_task(model.generate_async(list(range(10, 30))))
        await gate.reached.acquire()
        gate.open(1)
        await gate.reached.acquire()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.open()
        await in_queue(model, 0)
        assert gate.runtime.fed == list(range(10, 18))
        # The chunks that were computed stay cached.
        await model.generate_async(list(range(10, 20)))
        assert gate.runtime.fed[:10] == list(range(10, 20))

    run(work())


def test_leaving_the_loop_ends_the_stream(bundle: Bundle) -> None:
    async def work() -> None:
        model = scripted(bundle, "hello")
        async for _ in model.stream("x"):
            break
        assert (await model.generate_async("x")).text == "hello"
        async with aclosing(model.stream("x")) as stream:
            assert await anext(stream) == "h"
        assert stream.generation.stop_reason == "interrupted"
        assert (await model.generate_async("x")).text == "hello"
        while any(thread.name.startswith("edgelm-stream") for thread in threading.enumerate()):
            await asyncio.sleep(0.001)

    run(work())


def test_a_call_that_would_deadlock_its_task_or_loop_is_refused(bundle: Bundle) -> None:
    async def work() -> None:
        model = scripted(bundle, "hello")
        async with aclosing(model.stream("x")) as stream:
            assert await anext(stream) == "h"
            with pytest.raises(GenerationError, match="open in this task: exhaust it, or close"):
                await model.generate_async("x")
            with pytest.raises(GenerationError, match="event loop of this thread, which this call would block"):
                model.generate("x")
            assert await pieces(stream) == ["e", "l", "l", "o"]
        assert model.generate("x").text == "hello"

    run(work())


def test_errors_are_raised_in_the_task(bundle: Bundle) -> None:
    async def work() -> None:
        model = scripted(bundle, "hello")
        with pytest.raises(GenerationTypeError, match="did you mean temperature"):
            await model.generate_async("x", temprature=1.0)  # type: ignore[call-arg]
        stream = model.stream("x")
        assert await anext(stream) == "h"
        await asyncio.to_thread(model.close)
        with pytest.raises(EdgeLMError, match="this model was closed"):
            await anext(stream)
        with pytest.raises(EdgeLMError, match="this model was closed"):
            await model.chat_async([{"role": "user", "content": "Hi"}])

    run(work())
