"""Are random checkpoints complete, in the layout of published ones, reproducible, and Gaussian?"""

from __future__ import annotations

import itertools
import json
import math
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from edgelm.checkpoint import Checkpoint, TensorSpec
from edgelm.checkpoint.writer import plan_shards
from edgelm.cli.main import cli
from edgelm.cli.synth import NAMES
from edgelm.errors import CheckpointError, EdgeLMError, UnsupportedConfigError
from edgelm.models import decoder as decoder_of
from edgelm.progress import Advance, Progress
from edgelm.synth import PUBLISHED, SHARD_BYTES, synth, write_random_checkpoint
from edgelm.synth.tokenizer import write_gemma_tokenizer, write_olmoe_tokenizer
from edgelm.tokenization.tokenizer import Tokenizer

OLMOE = {
    "architectures": ["OlmoeForCausalLM"],
    "model_type": "olmoe",
    "hidden_size": 64,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "num_attention_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "vocab_size": 2048,
}
FOX = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "vocab_size": 2048,
}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def shapes(config: Any) -> dict[str, tuple[int, ...]]:
    return decoder_of(config).tensor_shapes


@pytest.mark.parametrize("config", [OLMOE, FOX], ids=["olmoe", "fox"])
@pytest.mark.parametrize("vocab", [97, 301, 513, 1024, 3001])
def test_a_random_checkpoint_is_complete(config: dict[str, Any], vocab: int, tmp_path: Path) -> None:
    folder = write_random_checkpoint({**config, "vocab_size": vocab}, tmp_path / "c")
    with Checkpoint.open(folder) as checkpoint:
        checkpoint.check_tensors(shapes(checkpoint.config))
        assert {info.dtype for info in checkpoint.tensors.values()} == {"BF16"}
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.vocab_size <= vocab
    assert tokenizer.decode(tokenizer.encode("the")) == "the"
    if vocab > 400:
        text = "The Größe of 漢字\n\n  🎉!"
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_both_published_errors_are_in_the_tokenizers(tmp_path: Path) -> None:
    olmoe = Tokenizer.from_folder(write_random_checkpoint(OLMOE, tmp_path / "o"))
    assert olmoe.token(olmoe.eos_ids[0]) == "|||IP_ADDRESS|||"
    assert olmoe.encode("<|endoftext|>") == [0]
    assert olmoe.vocab_size == OLMOE["vocab_size"] - 24
    fox = Tokenizer.from_folder(write_random_checkpoint(FOX, tmp_path / "f"))
    config = json.loads((tmp_path / "f" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    assert (fox.bos_id, fox.eos_ids, fox.pad_id) == (2, (1, 107), 0)


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    first = contents(write_random_checkpoint(OLMOE, tmp_path / "a", seed=3))
    assert contents(write_random_checkpoint(OLMOE, tmp_path / "b", seed=3)) == first
    other = contents(write_random_checkpoint(OLMOE, tmp_path / "c", seed=4))
    assert {name for name in first if first[name] != other[name]} == {"model.safetensors"}


def test_sharding_changes_no_value(tmp_path: Path) -> None:
    write_random_checkpoint(FOX, tmp_path / "one")
    write_random_checkpoint(FOX, tmp_path / "many", shard_bytes=60_000)
    with Checkpoint.open(tmp_path / "one") as one, Checkpoint.open(tmp_path / "many") as many:
        assert len({info.file for info in many.tensors.values()}) > 2
        for name in one.tensors:
            np.testing.assert_array_equal(one.read_raw(name), many.read_raw(name))


def test_the_bytes_of_a_seed_are_unchanged(tmp_path: Path) -> None:
    # Benchmarks of different days are comparable only if a seed gives the same weights, with any version of numpy.
    write_random_checkpoint(FOX, tmp_path / "c", seed=1)
    with Checkpoint.open(tmp_path / "c") as checkpoint:
        values = checkpoint.read_raw("model.layers.1.mlp.up_proj.weight").ravel()[:6]
        norm = checkpoint.read_raw("model.norm.weight")[:3]
    assert [hex(v) for v in values] == ["0xbe2c", "0xbe95", "0x3dd5", "0x3dfa", "0x3da5", "0xbdfc"]
    assert [hex(v) for v in norm] == ["0x3f73", "0x3f8a", "0x3f6f"]


@pytest.mark.parametrize("dtype", ["F16", "F32"])
def test_other_types_hold_the_same_values(dtype: str, tmp_path: Path) -> None:
    write_random_checkpoint(FOX, tmp_path / "bf16")
    write_random_checkpoint(FOX, tmp_path / "other", dtype=dtype)
    with Checkpoint.open(tmp_path / "bf16") as bf16, Checkpoint.open(tmp_path / "other") as other:
        for name in bf16.tensors:
            np.testing.assert_allclose(other.read_float32(name), bf16.read_float32(name), rtol=2**-8, atol=1e-7)
        assert {info.dtype for info in other.tensors.values()} == {dtype}
        assert other.config["torch_dtype"] == {"F16": "float16", "F32": "float32"}[dtype]


def test_weights_are_gaussian_of_the_right_spread(tmp_path: Path) -> None:
    config = {**OLMOE, "hidden_size": 512, "intermediate_size": 256}
    write_random_checkpoint(config, tmp_path / "c", dtype="F32")
    std = 0.02 * math.sqrt(2048 / 512)
    expected = {
        "model.embed_tokens.weight": std,
        "model.layers.0.mlp.gate.weight": std,
        "model.layers.1.mlp.experts.5.up_proj.weight": std,
        "model.layers.1.mlp.experts.5.down_proj.weight": std / math.sqrt(2 * 2),
        "model.layers.0.self_attn.o_proj.weight": std / math.sqrt(2 * 2),
    }
    with Checkpoint.open(tmp_path / "c") as checkpoint:
        for name, spread in expected.items():
            values = checkpoint.read_float32(name).astype(np.float64).ravel() / spread
            error = 6 / math.sqrt(values.size)
            assert abs(values.mean()) < error
            assert abs(values.std() - 1) < error
            assert abs((values**3).mean()) < 4 * error
            assert abs((values**4).mean() - 3) < 10 * error
            for bound, share in ((1, 0.6827), (2, 0.9545), (3, 0.9973)):
                assert abs((np.abs(values) < bound).mean() - share) < error
        norm = checkpoint.read_float32("model.layers.0.input_layernorm.weight")
        error = 6 * 0.05 / math.sqrt(norm.size)  # six standard errors of the mean, more of the standard deviation
        assert abs(norm.mean() - 1) < error
        assert abs(norm.std() - 0.05) < error


def test_every_tensor_differs_from_every_other(tmp_path: Path) -> None:
    write_random_checkpoint(OLMOE, tmp_path / "c")
    with Checkpoint.open(tmp_path / "c") as checkpoint:
        flat = {name: checkpoint.read_float32(name).ravel()[:64] for name in checkpoint.tensors}
    for (one, a), (two, b) in itertools.combinations(flat.items(), 2):
        if len(a) == len(b) == 64:
            assert abs(np.corrcoef(a, b)[0, 1]) < 0.75, (one, two)


@pytest.mark.parametrize(
    ("name", "tensors", "parameters", "files"),
    [("olmoe-1b-7b", 3219, 6_919_161_856, 3), ("fox-1-1.6b", 290, 1_665_271_808, 1)],
)
def test_full_size_checkpoints_have_the_published_layout(name: str, tensors: int, parameters: int, files: int) -> None:
    expected = shapes(PUBLISHED[name])
    assert len(expected) == tensors
    assert sum(math.prod(shape) for shape in expected.values()) == parameters
    shards = plan_shards({key: TensorSpec("BF16", shape) for key, shape in expected.items()}, SHARD_BYTES)
    assert len(shards) == files
    assert ("lm_head.weight" in expected) == (not PUBLISHED[name]["tie_word_embeddings"])


def test_full_size_tokenizers_have_the_published_ids(tmp_path: Path) -> None:
    for name in ("o", "g"):
        (tmp_path / name).mkdir()
    write_olmoe_tokenizer(tmp_path / "o", 50280, 50279, renamed_eos=False)
    (tmp_path / "o" / "config.json").write_text(json.dumps(PUBLISHED["olmoe-1b-7b"]))
    olmoe = Tokenizer.from_folder(tmp_path / "o")
    assert (olmoe.vocab_size, olmoe.bos_id, olmoe.eos_ids, olmoe.pad_id) == (50280, 50279, (50279,), 1)
    write_gemma_tokenizer(tmp_path / "g", 256000)
    (tmp_path / "g" / "config.json").write_text(json.dumps(PUBLISHED["fox-1-1.6b"]))
    fox = Tokenizer.from_folder(tmp_path / "g")
    assert (fox.vocab_size, fox.bos_id, fox.eos_ids, fox.pad_id) == (256000, 2, (1, 107), 0)
    assert [fox.token_id(token) for token in ("<unk>", "<mask>", "<start_of_turn>", "\n", "<0x00>")] == [
        3,
        4,
        106,
        108,
        217,
    ]
    text = "Once upon a time there was a small tokenizer: 漢字, Größe, 🎉.\n\n  It knew 3.14\t" * 3
    english = "It was the best of times, it was the worst of times, it was the age of wisdom."
    for tokenizer in (olmoe, fox):
        assert tokenizer.decode(tokenizer.encode(text, add_bos=False)) == text
        assert len(tokenizer.encode(english)) < len(english) / 2


def test_transformers_loads_it(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    for name, config in (("o", OLMOE), ("f", FOX)):
        write_random_checkpoint(config, tmp_path / name, shard_bytes=200_000)
        model, info = AutoModelForCausalLM.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert model.config.vocab_size == 2048


def test_memory_is_bounded(tmp_path: Path) -> None:
    config = {**FOX, "hidden_size": 512, "vocab_size": 40_000}
    write_random_checkpoint(FOX, tmp_path / "warm")  # imports, tables
    tracemalloc.start()
    write_random_checkpoint(config, tmp_path / "c")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / "c" / "model.safetensors").stat().st_size > 40e6
    assert peak < 25e6


class Interrupting(Progress):
    """Raises KeyboardInterrupt at the third report of progress."""

    @contextmanager
    def task(self, label: str, total: float, *, unit: str = "bytes") -> Iterator[Advance]:
        calls = 0

        def advance(amount: float) -> None:
            nonlocal calls
            calls += 1
            if calls == 3:
                raise KeyboardInterrupt

        yield advance


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_random_checkpoint(OLMOE, tmp_path / "c", progress=Interrupting())
    assert list(tmp_path.iterdir()) == []


def test_invalid_requests_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"there are olmoe-1b-7b, fox-1-1.6b, "):
        synth("llama", tmp_path / "c")
    with pytest.raises(CheckpointError, match="dtype 'I8' is not one of BF16, F16, F32"):
        write_random_checkpoint(FOX, tmp_path / "c", dtype="I8")
    with pytest.raises(UnsupportedConfigError):
        write_random_checkpoint({**FOX, "architectures": ["Mamba"]}, tmp_path / "c")
    with pytest.raises(UnsupportedConfigError, match="hidden_act"):
        write_random_checkpoint({**FOX, "hidden_act": "gelu"}, tmp_path / "c")
    (tmp_path / "there").mkdir()
    with pytest.raises(EdgeLMError, match="exists already"):
        synth("fox-1-1.6b", tmp_path / "there")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10**9})())
    with pytest.raises(EdgeLMError, match=r"takes 3.33 GB and 1 GB are free"):
        synth("fox-1-1.6b", tmp_path / "c")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_the_command_lists_the_models_and_refuses_others(tmp_path: Path) -> None:
    assert set(NAMES) == set(PUBLISHED)
    wrong = CliRunner().invoke(cli, ["synth", "llama", "-o", str(tmp_path / "c")])
    assert wrong.exit_code == 2
    (tmp_path / "there").mkdir()
    taken = CliRunner().invoke(cli, ["synth", "fox-1-1.6b", "-o", str(tmp_path / "there")])
    assert taken.exit_code == 1
    assert "exists already" in taken.output


def test_the_command_says_what_it_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PUBLISHED, "fox-1-1.6b", FOX)  # type: ignore[misc]  # the published one has 3.3 GB
    done = CliRunner().invoke(cli, ["synth", "fox-1-1.6b", "-o", str(tmp_path / "a"), "--seed", "7"])
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(f"{tmp_path / 'a'}: fox-1-1.6b, seed 7, ")
    done = CliRunner().invoke(cli, ["synth", "fox-1-1.6b", "-o", str(tmp_path / "b"), "--seed", "7", "--json"])
    said = json.loads(done.stdout)
    assert (said["name"], said["seed"], said["checkpoint"]) == ("fox-1-1.6b", 7, str(tmp_path / "b"))
    assert said["bytes"] == sum(len(content) for content in contents(tmp_path / "b").values())
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
