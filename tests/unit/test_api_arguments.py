"""Does the Python API accept every valid argument, and raise a clear EdgeLMError for every invalid one?"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_graph import write_tiny_model

from edgelm.errors import ContextLengthError, EdgeLMError, GenerationError, TokenizerError
from edgelm.generation.language_model import LanguageModel, load
from edgelm.generation.sampling import Sampler, Sampling
from edgelm.runtimes import open_batch, open_runtime, open_tracing


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return load(write_tiny_model(tmp_path_factory.mktemp("tiny") / "bundle", eos_ids=(2,)).path, threads=1)


def one_line(error: BaseException) -> str:
    said = str(error)
    assert said
    assert "\n" not in said
    assert len(said) < 400
    return said


NAN, INF = float("nan"), float("inf")
NUMBERS: list[Any] = [NAN, INF, -INF, -1, "1", None, True, [1], 1j, {}, b"1"]
WRONG: dict[str, list[Any]] = {
    "max_tokens": [NAN, 2.5, 2.0, True, False, 0, -1, "5", [1], INF, np.float64(3)],
    "temperature": NUMBERS,
    "top_k": [NAN, 2.5, True, -1, "5", None, [1]],
    "top_p": [*NUMBERS, 0, 1.5],
    "min_p": [*NUMBERS, 1.5],
    "repetition_penalty": [*NUMBERS, 0],
    "seed": [NAN, 1.0, True, -1, 2**64, "5", [1]],
    "reuse": [1, 0, None, "yes", np.bool_(True)],
    "stop": [5, 0, False, [1], ["a", 1], b"x", "", [""], [b"x"], 1.5, [None], ["a", ""]],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_an_invalid_option_is_named(model: LanguageModel, name: str, value: Any) -> None:
    more = (
        {}
        if name in ("max_tokens", "temperature", "seed", "stop", "reuse", "repetition_penalty")
        else {"temperature": 1.0}
    )
    with pytest.raises(GenerationError) as caught:
        model.generate("x", **{**more, name: value})
    assert one_line(caught.value).startswith(name if name != "stop" else "stop")


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": np.int32(3)},
        {"max_tokens": 3, "temperature": np.float32(0.5), "top_k": np.int64(3), "seed": np.uint64(2**64 - 1)},
        {"max_tokens": 3, "temperature": 1, "top_p": 1, "min_p": 0, "repetition_penalty": 1},
        {"max_tokens": 3, "stop": None},
        {"max_tokens": 3, "stop": []},
        {"max_tokens": 3, "stop": (text for text in ["never said"])},
        {"max_tokens": 3, "stop": "never said"},
    ],
)
def test_numpy_values_and_other_sequences_are_accepted(model: LanguageModel, options: dict[str, Any]) -> None:
    assert len(model.generate("x", **options).tokens) == 3


@pytest.mark.parametrize("temperature", [1e-300, 5e-324, 1e-45, 1e-30])
@pytest.mark.parametrize("more", [{}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_a_temperature_near_zero_is_greedy(model: LanguageModel, temperature: float, more: dict[str, Any]) -> None:
    greedy = model.generate("hello", max_tokens=6).tokens
    assert model.generate("hello", max_tokens=6, temperature=temperature, seed=1, **more).tokens == greedy


def test_a_temperature_beyond_float32_is_uniform() -> None:
    logits = np.array([0, 50, -50, 3], np.float32)
    drawn = [Sampler(Sampling(temperature=1e300, seed=seed)).sample(logits) for seed in range(400)]
    assert min(np.bincount(drawn, minlength=4)) > 60


@pytest.mark.parametrize("penalty", [1e-300, 1e300])
def test_a_penalty_beyond_float32_does_not_overflow(penalty: float) -> None:
    logits = np.array([1, 2, -1], np.float32)
    chosen = Sampler(Sampling(repetition_penalty=penalty), seen=[1]).sample(logits)
    assert chosen == (1 if penalty < 1 else 0)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ([2**63], "number 0 is beyond any vocabulary"),
        ([1, -(2**70)], "number 1 is beyond any vocabulary"),
        ([2**31], "is outside the vocabulary"),
        ([-1], "is outside the vocabulary"),
        ([1, 2.0], "number 1 is 2.0"),
        ([NAN], "number 0 is nan"),
        ([True, 1], "number 0 is True"),
        (["1"], "number 0 is '1'"),
        ([[1, 2]], r"number 0 is \[1, 2\]"),
        ([None], "number 0 is None"),
        (None, "None cannot be used"),
        (5, "5 cannot be used"),
        (b"abc", "b'abc' cannot be used"),
        ({1, 2}, "cannot be used"),
        ({"role": "user"}, "cannot be used"),
        (np.array([1.0, 2.0]), r"an array of float64 with shape \(2,\)"),
        (np.array([[1, 2]]), r"an array of int64 with shape \(1, 2\)"),
        (np.array([2**63], np.uint64), "9223372036854775808 is beyond any vocabulary"),
        (np.array(["a"]), "an array of <U1"),
        (np.array([1, None]), "an array of object"),
        (np.array(7), "an array of int64"),
        ([], "the prompt is empty"),
    ],
)
def test_a_prompt_that_is_neither_text_nor_token_ids_is_named(model: LanguageModel, prompt: Any, said: str) -> None:
    with pytest.raises(GenerationError, match=said) as caught:
        model.generate(prompt, max_tokens=1)
    one_line(caught.value)
    if not isinstance(prompt, str) and not (isinstance(prompt, list) and not prompt):
        with pytest.raises(GenerationError):
            model.runtime.prefill(prompt)


@pytest.mark.parametrize(
    "prompt",
    [[1, 5, 7], (1, 5, 7), np.array([1, 5, 7], np.uint8), np.array([1, 5, 7]), iter([1, 5, 7]), range(1, 8, 3)],
)
def test_token_ids_of_any_integer_type_are_accepted(model: LanguageModel, prompt: Any) -> None:
    assert len(model.generate(prompt, max_tokens=2).tokens) == 2
    assert model.generate([1, 5, 7], max_tokens=2) is not None


@pytest.mark.parametrize(
    "messages",
    [
        None, 5, "hello", b"x", [], {}, ["hello"], [5], [None], [{}], [{"role": "user"}], [{"content": "x"}],
        [{"role": 5, "content": "x"}], [{"role": "user", "content": 5}], [{"role": "user", "content": None}],
        [{"role": "user", "content": ["x"]}], {"role": "user", "content": "x"}, [[("role", "user")]],
        [{"role": "user", "content": "\ud800"}],
    ],
)  # fmt: skip
def test_invalid_messages_are_refused(model: LanguageModel, messages: Any) -> None:
    with pytest.raises(EdgeLMError) as caught:
        model.chat(messages, max_tokens=1)
    one_line(caught.value)
    wrong_type = isinstance(messages, str | bytes | dict | int | None)
    assert isinstance(caught.value, TypeError) == wrong_type
    assert isinstance(caught.value, ValueError) != wrong_type or isinstance(caught.value, TokenizerError)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"threads": 0}, "threads is 0: it has to be an integer, 1 or more"),
        (
            {"threads": 10**12},
            r"^1000000000000 threads are more than the \d+ CPUs? that this process may use",
        ),
        ({"threads": 1.0}, "threads is 1.0: it has to be"),
        ({"threads": True}, "threads is True: it has to be"),
        ({"threads": "2"}, "threads is '2': it has to be"),
        ({"context_length": 0}, "context_length is 0: give 1 to"),
        ({"context_length": 2.5}, "context_length is 2.5: it has to be"),
        ({"context_length": NAN}, "context_length is nan: it has to be"),
        ({"context_length": "64"}, "context_length is '64': it has to be"),
        ({"context_length": 10**15}, "context_length is 1000000000000000: give 1 to"),
        ({"context_length": 10**30}, "context_length is 1000000000000000000000000000000: give 1 to"),
        ({"kv": 5}, "kv is 5: it has to be the name of a type"),
        ({"kv": ["int8"]}, r"kv is \['int8'\]: it has to be"),
        ({"kv": "int4"}, "kv is 'int4'"),
        ({"runtime": 5}, "there is no runtime 5"),
        ({"weight_memory": 5}, "has no option 'weight_memory'"),
    ],
)
def test_an_invalid_option_of_load_is_named(model: LanguageModel, options: Any, said: str) -> None:
    with pytest.raises(EdgeLMError, match=said) as caught:
        load(model.bundle.path, **options)
    one_line(caught.value)
    if "it has to be" in said:
        wrong_type = options not in ({"threads": 0}, {"threads": 10**12})
        assert isinstance(caught.value, TypeError if wrong_type else ValueError)


def test_all_ways_to_load_have_the_same_checks(model: LanguageModel) -> None:
    with pytest.raises(EdgeLMError, match="threads is 0"):
        open_runtime(model.bundle, threads=0)
    with pytest.raises(EdgeLMError, match="threads is 0"):
        open_tracing(model.bundle, "onnxruntime-cpu", threads=0)
    with pytest.raises(EdgeLMError, match=r"batch is 1\.5"):
        open_batch(model.bundle, 1.5)  # type: ignore[arg-type]
    with pytest.raises(ContextLengthError):
        open_runtime(model.bundle, context_length=10**9)
    with open_runtime(model.bundle, threads=np.int64(1), context_length=np.int32(16)) as runtime:  # type: ignore[arg-type]
        assert runtime.context_length == 16
        assert runtime.prefill([1]).shape == (runtime.vocab_size,)


@pytest.mark.parametrize("path", [5, None, b"x", ["x"], "", "a\0b", "\ud800"])
def test_an_invalid_path_is_named(path: Any) -> None:
    with pytest.raises(EdgeLMError) as caught:
        load(path)
    one_line(caught.value)


LIMITED = """
import json, resource, sys, time
from pathlib import Path
from edgelm.bundle import Bundle
from edgelm.errors import EdgeLMError
import numpy
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (300 << 20), -1))
for field, value in json.loads(sys.argv[2]):
    document = json.loads(Path(sys.argv[1], "manifest.json").read_text())
    part = document
    *path, last = field
    for key in path:
        part = part[key]
    part[last] = value
    Path(sys.argv[1], "manifest.json").write_text(json.dumps(document))
    start = time.process_time()
    try:
        Bundle.open(sys.argv[1])
        print("accepted", field, value)
    except EdgeLMError as error:
        assert time.process_time() - start < 1, field
    part[last] = None
    Path(sys.argv[1], "manifest.json").write_text(sys.argv[3])
print("done")
"""


def test_hostile_counts_in_a_manifest_use_little_memory_and_time(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "bundle").path
    text = (folder / "manifest.json").read_text()
    shapes = ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "vocab_size", "context_length",
              "num_experts", "experts_per_token")  # fmt: skip
    fields: list[tuple[list[Any], Any]] = [(["model", name], value) for name in shapes for value in (10**12, 2**63)]
    fields += [(["tensors", 0, name], 10**12) for name in ("offset", "size", "crc32")]
    fields += [(["tensors"], [{"name": "x", "offset": 0, "size": 0, "crc32": 0, "layer": 10**9}])]
    fields += [
        (["files", "model.onnx", "size"], 10**15),
        (["tokens", "eos_ids"], [10**12]),
    ]
    done = subprocess.run(
        [sys.executable, "-P", "-c", LIMITED, str(folder), json.dumps(fields), text],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.stdout, done.stderr[-500:]) == ("done\n", "")
