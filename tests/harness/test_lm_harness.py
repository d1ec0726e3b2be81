"""Does lm-evaluation-harness get the same results from a bundle as from the PyTorch reference?"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

import edgelm
from edgelm.bundle import Bundle
from edgelm.checkpoint import Checkpoint
from edgelm.cli.main import cli
from edgelm.errors import EdgeLMError
from edgelm.export import ExportOptions, export_bundle
from edgelm.installing import install_hint
from edgelm.parity.golden import GoldenOptions
from edgelm.parity.prompts import Prompt
from edgelm.reference.module import ReferenceModel
from edgelm.runtimes.onnxruntime.native_library import library_path
from edgelm.tokenization.tokenizer import Tokenizer

CHECKPOINTS = Path(__file__).parents[2] / "examples" / "checkpoints"
TASKS = Path(__file__).parent / "tasks"
NAMES = ("edgelm_choices", "edgelm_letters", "edgelm_answers", "edgelm_texts")
WINDOW = 192
SHORT = GoldenOptions(prompts=(Prompt("short", "The quick brown fox"),), greedy_tokens=2)
# Neither `sys.modules["torch"] = None` nor a finder that raises works: packages check whether it can be found.
WITHOUT_TORCH = """
import sys
from edgelm.cli.main import cli

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, *arguments):
        if name.partition(".")[0] not in ("torch", "transformers"):
            return self.finder.find_spec(name, *arguments)

sys.meta_path[:] = map(Without, sys.meta_path)
"""
HAS_HARNESS = importlib.util.find_spec("lm_eval") is not None

needs_harness = pytest.mark.skipif(not HAS_HARNESS, reason=f"needs lm-evaluation-harness: {install_hint('eval')}")


@pytest.mark.skipif(os.environ.get("CI") != "true", reason="a machine may lack it; CI may not")
def test_ci_has_the_harness_whose_tests_skip_without_it() -> None:
    assert HAS_HARNESS


def test_without_the_harness_the_verb_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name))
    result = CliRunner().invoke(cli, ["harness", "--model", "edgelm"])
    assert result.exit_code == 1
    assert install_hint("eval") in result.output


class Reference:
    """A tiny trained checkpoint in PyTorch, and direct computations of the results that the harness must get."""

    def __init__(self, name: str) -> None:
        self.checkpoint = Checkpoint.open(CHECKPOINTS / name)
        self.module = ReferenceModel(self.checkpoint.decoder)
        self.module.load_weights(self.checkpoint.read_float32)
        self.tokenizer = Tokenizer.from_folder(self.checkpoint.path)
        begin = self.tokenizer.bos_id
        self.prefix = self.tokenizer.eos_ids[0] if begin is None else begin

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> Tensor:
        """Return the logits [T, V] after each of T tokens."""
        found: Tensor = self.module(torch.tensor([list(ids)]))[0]
        return found

    def score(self, inputs: Sequence[int], targets: Sequence[int]) -> tuple[float, bool, float]:
        """Return the log-likelihood of `targets` after the last inputs, whether all are most likely, and tolerance."""
        logits = self.logits(inputs)[-len(targets) :]
        wanted = torch.tensor(targets)
        chosen = torch.log_softmax(logits.double(), -1).gather(1, wanted[:, None]).sum()
        greedy = bool((logits.argmax(-1) == wanted).all())
        return float(chosen), greedy, self.tolerance(logits)

    def tolerance(self, logits: Tensor) -> float:
        """Return the allowed difference between the sums of log-probabilities of two float32 implementations.

        A dot product of D values in another order has an error of about sqrt(D) roundings. There are seven matmuls per
        layer, whose errors add up like a random walk; twice, for the token's logit and the normaliser; for every token.
        """
        matmuls = 7 * self.module.decoder.num_layers + 1
        relative = math.sqrt(self.module.decoder.hidden_size * matmuls) * np.finfo(np.float32).eps
        return float(2 * len(logits) * relative * logits.abs().max())

    def pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return inputs and targets, as the harness splits them: spaces at the end of a context go to the continuation.

        The context is encoded alone, even if its last token would merge with the continuation.
        """
        before, whole = self.tokenizer.encode(context.rstrip()), self.tokenizer.encode(context + continuation)
        targets = whole[len(before) :]
        return [*before, *targets][-(WINDOW + 1) :][:-1], targets

    def rolling(self, text: str) -> tuple[float, float]:
        """Return the log-likelihood of a text in windows, each token once; the last window is as long as the others."""
        ids = self.tokenizer.encode(text, add_bos=False)
        whole = [self.prefix, *ids]
        total = tolerance = 0.0
        for begin in range(0, len(ids), WINDOW):
            end = min(begin + WINDOW, len(ids))
            value, _, room = self.score(whole[max(0, end - WINDOW) : end], ids[begin:end])
            total, tolerance = total + value, tolerance + room
        return total, tolerance

    def greedy(self, text: str, count: int) -> str:
        """Return the greedy continuation of a text, up to a stop string of the tasks."""
        ids = self.tokenizer.encode(text)
        new: list[int] = []
        for _ in range(count):
            token = int(self.logits([*ids, *new])[-1].argmax())
            if token in self.tokenizer.eos_ids:
                break
            new.append(token)
        answer = self.tokenizer.decode(new)
        for stop in ("\n\n", "def "):
            answer = answer.split(stop)[0]
        return answer


@dataclass(frozen=True)
class Judged:
    """Results of the harness with a bundle, and the reference of its model."""

    reference: Reference
    bundle: Bundle
    results: dict[str, Any]

    def samples(self, task: str) -> Iterator[tuple[tuple[Any, ...], list[Any]]]:
        """Yield (arguments, results) of each request."""
        found = self.results["samples"][task]
        assert found, f"{task} has no samples"
        for sample in found:
            for arguments, answers in zip(sample["arguments"], sample["resps"], strict=True):
                yield arguments, answers[0]


def exported(name: str, recipe: str, ops: str, out: Path) -> Bundle:
    return export_bundle(CHECKPOINTS / name, out, recipe=recipe, options=ExportOptions(golden=SHORT, ops=ops))


@pytest.fixture(scope="module", params=["olmoe-tiny", "fox-tiny"])
def reference(request: pytest.FixtureRequest) -> Reference:
    return Reference(request.param)


@pytest.fixture(scope="module", params=["native", "portable"])
def judged(reference: Reference, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Judged:
    if request.param == "native" and library_path() is None:
        pytest.skip("this installation has no compiled operators")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    import edgelm.evaluation.lm_harness  # noqa: F401  # registers the model

    bundle = exported(reference.checkpoint.path.name, "none", request.param, tmp_path_factory.mktemp("bundle") / "b")
    results = simple_evaluate(
        model="edgelm",
        model_args=f"bundle={bundle.path},kv=float32,threads=1,context_length={WINDOW}",
        tasks=list(NAMES),
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        bootstrap_iters=0,
    )
    return Judged(reference, bundle, results)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from edgelm.evaluation.lm_harness import EdgeLM

    bundle = exported("fox-tiny", "none", "portable", tmp_path_factory.mktemp("bundle") / "b")
    opened = EdgeLM(str(bundle.path), threads=1, context_length=WINDOW)
    yield opened
    opened.close()


@needs_harness
def test_log_likelihoods_and_greedy_flags_are_the_references(judged: Judged) -> None:
    flags = []
    for task in ("edgelm_choices", "edgelm_letters"):
        for (context, continuation), (found, greedy) in judged.samples(task):
            inputs, targets = judged.reference.pair(context, continuation)
            expected, is_greedy, tolerance = judged.reference.score(inputs, targets)
            assert found == pytest.approx(expected, abs=tolerance, rel=0), (task, continuation)
            assert greedy == is_greedy, (task, continuation)
            flags.append(greedy)
    assert set(flags) == {True, False}  # otherwise the test would not check the flags


@needs_harness
def test_rolling_log_likelihoods_are_the_references(judged: Judged) -> None:
    longest = 0
    for (text,), found in judged.samples("edgelm_texts"):
        expected, tolerance = judged.reference.rolling(text)
        assert found == pytest.approx(expected, abs=tolerance, rel=0)
        longest = max(longest, len(judged.reference.tokenizer.encode(text)))
    assert longest > WINDOW  # more than one window was needed


@needs_harness
def test_generated_text_is_what_edgelm_and_the_reference_generate(judged: Judged) -> None:
    with edgelm.load(judged.bundle.path, kv="float32", threads=1, context_length=WINDOW) as plain:
        for (context, settings), found in judged.samples("edgelm_answers"):
            stops, count = settings["until"], settings["max_gen_toks"]
            assert found == plain.generate(context, temperature=0.0, max_tokens=count, stop=stops).text
            assert found == judged.reference.greedy(context, count)


@needs_harness
def test_the_command_scores_an_int4_bundle_offline_and_without_torch(tmp_path: Path) -> None:
    bundle = exported("olmoe-tiny", "int4", "auto", tmp_path / "b")
    arguments = ["harness", "--model", "edgelm", "--model_args", f"bundle={bundle.path},threads=1", "--tasks",
                 ",".join(NAMES), "--include_path", str(TASKS), "--output_path", str(tmp_path / "out"),
                 "--log_samples"]  # fmt: skip
    command = [sys.executable, "-P", "-c", WITHOUT_TORCH + f"cli({arguments!r}, prog_name='edgelm')"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"),
                   "USE_TORCH": "0"}  # fmt: skip
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "edgelm_choices" in ran.stdout
    (written,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(written.read_text())
    assert results["config"]["edgelm_recipe"] == "int4"
    (samples,) = (tmp_path / "out").rglob("samples_edgelm_choices_*.jsonl")
    reference, differences = Reference("olmoe-tiny"), []
    for line in samples.read_text().splitlines():
        sample = json.loads(line)
        for request, answer in zip(sample["arguments"].values(), sample["filtered_resps"], strict=True):
            inputs, targets = reference.pair(request["arg_0"], request["arg_1"])
            differences.append((float(answer[0]) - reference.score(inputs, targets)[0]) / len(targets))
    # Near the float model, but not equal to it.
    assert 1e-3 < float(np.abs(differences).mean()) < 0.5


@needs_harness
def test_shared_prefixes_are_computed_once_and_change_nothing(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    context = list(range(10, 110))
    requests = [
        (None, [*context, *middle], end) for middle in ([5] * 4, [6, 7] * 3) for end in ([8], [9], [11, 12, 13])
    ]
    alone = [model._loglikelihood_tokens([request], disable_tqdm=True)[0] for request in requests]
    fed = 0
    runtime = model._model.runtime
    step = runtime._graph.step

    def counted(ids: Any, **options: Any) -> Any:
        nonlocal fed
        fed += ids.size
        return step(ids, **options)

    monkeypatch.setattr(runtime._graph, "step", counted)
    together = model._loglikelihood_tokens(requests, disable_tqdm=True)
    # The context once, and the few tokens after it; without sharing it would be six times the context.
    assert 100 < fed < 140
    for one, other in zip(alone, together, strict=True):
        assert one[0] == pytest.approx(other[0], abs=1e-3)
        assert one[1] == other[1]


@needs_harness
def test_a_context_that_does_not_fit_loses_its_beginning(model: Any) -> None:
    ids = (np.random.default_rng(1).integers(10, 2000, 2 * WINDOW)).tolist()
    long, short = model._loglikelihood_tokens([(None, ids, [8, 9]), (None, ids[-(WINDOW - 1) :], [8, 9])], True)
    assert long == short
    generated = [
        model.generate_until([_instance(text, {"max_gen_toks": 8})], disable_tqdm=True)
        for text in ("x = 1\n" * 200, "y = 2\n" + "x = 1\n" * 200)
    ]
    assert generated[0] == generated[1]
    text, room = "x = 1\n" * 200 + "def add(a, b):\n    return a", WINDOW - 8
    (answer,) = model.generate_until([_instance(text, {"max_gen_toks": 8})], disable_tqdm=True)
    ids = model.tok_encode(text)
    end, beginning = (
        model._model.generate(part, max_tokens=8, temperature=0).text for part in (ids[-room:], ids[:room])
    )
    assert answer == end != beginning


@needs_harness
def test_scoring_after_generating_and_the_other_way_round_is_the_same(model: Any) -> None:
    request = (None, list(range(10, 40)), [8, 9])
    first = model._loglikelihood_tokens([request], True)
    text = model.generate_until([_instance("import os\nimport ", {"max_gen_toks": 8})], True)
    assert model._loglikelihood_tokens([request], True) == first
    assert model.generate_until([_instance("import os\nimport ", {"max_gen_toks": 8})], True) == text


@needs_harness
def test_chats_are_written_by_the_bundles_template(model: Any) -> None:
    question = {"role": "user", "content": "Hello"}
    asked = model.apply_chat_template([question])
    assert asked == "<bos><start_of_turn>user\nHello<end_of_turn>\n<start_of_turn>model\n"
    begun = model.apply_chat_template([question, {"role": "assistant", "content": "It is "}], False)
    assert begun.endswith("<start_of_turn>model\nIt is")
    # This template refuses system messages.
    assert model.apply_chat_template([{"role": "system", "content": "Be brief."}, question]) == asked
    # The template writes bos.
    ids = model.tok_encode(asked)
    assert ids.count(model._tokens.bos_id) == 1 and ids[0] == model._tokens.bos_id
    assert model.chat_template(False) is None
    assert "start_of_turn" in model.chat_template(True)
    assert model.tokenizer_name.startswith("edgelm-")


@needs_harness
def test_tasks_run_as_chats(tmp_path: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    import edgelm.evaluation.lm_harness  # registers the model

    bundle = exported("olmoe-tiny", "int8", "auto", tmp_path / "b")
    results = simple_evaluate(
        model="edgelm", model_args={"bundle": str(bundle.path), "threads": 1}, tasks=["edgelm_choices"], limit=2,
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False), apply_chat_template=True,
        bootstrap_iters=0,
    )  # fmt: skip
    prompt = results["samples"]["edgelm_choices"][0]["arguments"][0][0]
    with edgelm.load(bundle.path, threads=1) as plain:
        ending = plain.render_chat([{"role": "user", "content": "z"}]).split("z")[-1]
    assert prompt.endswith(ending)


@needs_harness
def test_generation_settings_are_understood_or_refused() -> None:
    from edgelm.evaluation.lm_harness import generation_options

    assert generation_options({}) == {"stop": [], "max_tokens": 256, "temperature": 0.0}
    assert generation_options({"until": "x", "max_new_tokens": 3, "do_sample": False, "temperature": 0.7}) == {
        "stop": ["x"], "max_tokens": 3, "temperature": 0.0,
    }  # fmt: skip
    assert generation_options({"do_sample": True})["temperature"] == 1.0
    sampled = generation_options({"temperature": 0.5, "top_p": 0.9, "seed": 1, "until": ["", "a"]})
    assert sampled == {"stop": ["a"], "max_tokens": 256, "temperature": 0.5, "top_p": 0.9, "seed": 1}
    with pytest.raises(EdgeLMError, match=r"num_beams is unknown; there are: .*temperature"):
        generation_options({"num_beams": 4})


@needs_harness
def test_impossible_requests_are_refused_with_a_reason(model: Any) -> None:
    from edgelm.evaluation.lm_harness import EdgeLM

    folder = str(model._model.bundle.path)
    with pytest.raises(EdgeLMError, match="batch_size is 8: bundles run one sequence at a time"):
        EdgeLM(folder, batch_size=8)
    with pytest.raises(EdgeLMError, match="pretrained is no setting of this model: write --model_args bundle=DIR"):
        EdgeLM.create_from_arg_string("pretrained=gpt2")
    with pytest.raises(EdgeLMError, match="which bundle is not said"):
        EdgeLM.create_from_arg_string("")
    with pytest.raises(EdgeLMError, match=f"a continuation of {WINDOW + 1} tokens does not fit"):
        model._loglikelihood_tokens([(None, [5], [6] * (WINDOW + 1))], True)
    with pytest.raises(EdgeLMError, match="500 tokens to generate leave no room"):
        model.generate_until([_instance("x", {"max_gen_toks": 500})], True)


def _instance(context: str, settings: dict[str, Any]) -> Any:
    from lm_eval.api.instance import Instance

    return Instance(request_type="generate_until", doc={}, arguments=(context, settings), idx=0)
