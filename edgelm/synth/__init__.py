"""Random checkpoints: full-size ones in place of published ones, and small ones for tests.

Weights are Gaussian. Each tensor has a random stream of its own, seeded by (seed, tensor name), so that the same seed
gives the same bytes in any sharding. A value is looked up by 16 random bits in a table of 65 536 quantiles of the
normal distribution (|z| < 4.2). This is several times faster than drawing normals, and exact enough for weights that
are rounded to bfloat16.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.checkpoint.safetensors import NUMPY_DTYPES
from edgelm.checkpoint.writer import ShardedWriter, TensorSpec, float32_to_bf16
from edgelm.checkpoint.written import CHECKPOINT
from edgelm.errors import CheckpointError, EdgeLMError
from edgelm.files import atomic_directory
from edgelm.models import decoder, family
from edgelm.models.spec import Decoder
from edgelm.progress import Progress, Silent
from edgelm.sizes import format_size
from edgelm.synth import tokenizer as synth_tokenizer

BLOCK = 1 << 18  # values drawn at a time: half a megabyte, which fits into a core's cache
SHARD_BYTES = 5_000_000_000  # transformers' "5GB", the shard size of the published checkpoints
DISK_RESERVE = 64 << 20  # bytes for tokenizer and index

_LLAMA_LIKE: Mapping[str, Any] = {
    "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02,
    "torch_dtype": "bfloat16", "use_cache": True,
}  # fmt: skip
_QWEN_LIKE: Mapping[str, Any] = {
    **_LLAMA_LIKE, "eos_token_id": 151645, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0,
    "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
# The published config.json files of the first two models; of the others, the fields that change the arithmetic.
PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "olmoe-1b-7b": {
        "architectures": ["OlmoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "clip_qkv": None,
        "eos_token_id": 50279, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 1024, "max_position_embeddings": 4096, "model_type": "olmoe", "norm_topk_prob": False,
        "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 16,
        "num_key_value_heads": 16, "output_router_logits": False, "pad_token_id": 1, "rope_scaling": None,
        "rope_theta": 10000.0, "router_aux_loss_coef": 0.01, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "use_cache": True, "vocab_size": 50304,
    },
    "fox-1-1.6b": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 4096, "max_position_embeddings": 8192, "mlp_bias": False, "model_type": "llama",
        "num_attention_heads": 16, "num_hidden_layers": 32, "num_key_value_heads": 4, "pretraining_tp": 1,
        "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 256000,
    },
    "llama-3.2-1b": {
        **_LLAMA_LIKE, "architectures": ["LlamaForCausalLM"], "eos_token_id": 128001, "head_dim": 64,
        "hidden_size": 2048, "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0, "tie_word_embeddings": True, "vocab_size": 128256,
    },
    "qwen3-0.6b": {
        **_QWEN_LIKE, "architectures": ["Qwen3ForCausalLM"], "head_dim": 128, "hidden_size": 1024,
        "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
        "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "sliding_window": None,
    },
    "qwen2.5-1.5b": {
        **_QWEN_LIKE,
        "architectures": ["Qwen2ForCausalLM"], "hidden_size": 1536, "intermediate_size": 8960,
        "max_position_embeddings": 32768, "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 12,
        "num_hidden_layers": 28, "num_key_value_heads": 2, "sliding_window": 32768,
    },
    "olmo-2-1b": {
        **_LLAMA_LIKE, "architectures": ["Olmo2ForCausalLM"], "eos_token_id": 100257, "hidden_size": 2048,
        "intermediate_size": 8192, "max_position_embeddings": 4096, "model_type": "olmo2", "num_attention_heads": 16,
        "num_hidden_layers": 16, "num_key_value_heads": 16, "rms_norm_eps": 1e-06, "rope_scaling": None,
        "rope_theta": 500000, "tie_word_embeddings": False, "vocab_size": 100352,
    },
    "mistral-7b": {
        **_LLAMA_LIKE,
        "architectures": ["MistralForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
        "sliding_window": None, "tie_word_embeddings": False, "vocab_size": 32768,
    },
}  # fmt: skip
PUBLISHED_DTYPE = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@cache
def _normal_quantiles() -> NDArray[np.float64]:
    """Return the midpoints of 65 536 equal parts of the standard normal distribution, exactly symmetric about 0."""
    inverse = NormalDist().inv_cdf
    upper = np.array([inverse(0.5 + (i + 0.5) / 65536) for i in range(32768)])
    return np.concatenate([-upper[::-1], upper])


@cache
def _table(mean: float, std: float, dtype: str) -> NDArray[Any]:
    values = (mean + std * _normal_quantiles()).astype(np.float32)
    return float32_to_bf16(values) if dtype == "BF16" else values.astype(NUMPY_DTYPES[dtype])


def _random_blocks(seed: int, name: str, count: int, table: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Yield `count` random values of `table` in blocks; they depend on seed and name only."""
    key = np.frombuffer(hashlib.sha256(f"{seed}:{name}".encode()).digest(), "<u4")
    bits = np.random.SFC64(key.tolist())
    for start in range(0, count, BLOCK):
        size = min(BLOCK, count - start)
        # Unlike Generator's methods, random_raw gives the same stream in every version of numpy.
        index = np.asarray(bits.random_raw(-(-size // 4))).astype("<u8", copy=False).view("<u2")[:size]
        yield np.take(table, index, mode="clip")


def _distribution(model: Decoder, name: str) -> tuple[float, float]:
    """Return mean and standard deviation of a tensor.

    The deviation is 0.02 at the published width and scales with 1/sqrt(width), so that router logits and attention
    scores have the same spread in small models. Projections into the residual stream are divided by sqrt(2 * layers),
    as in usual initialisations, so that the stream does not grow with depth.
    """
    if name not in model.matrices:
        return (0.0, 0.02) if name.endswith(".bias") else (1.0, 0.05)
    std = 0.02 * math.sqrt(2048 / model.hidden_size)
    if model.matrices[name].role in ("o", "down"):
        std /= math.sqrt(2 * model.num_layers)
    return 0.0, std


def _write_weights(
    config: Mapping[str, Any], folder: Path, seed: int, shard_bytes: int | None, dtype: str, progress: Progress
) -> None:
    model = decoder(config)
    shapes = model.tensor_shapes
    specs = {name: TensorSpec(dtype, shape) for name, shape in shapes.items()}
    total = sum(spec.nbytes for spec in specs.values())
    free = shutil.disk_usage(folder).free
    if free < total + DISK_RESERVE:
        raise EdgeLMError(
            f"{folder.parent}: the checkpoint takes {format_size(total)} and {format_size(free)} are free"
        )
    with ShardedWriter(folder, specs, shard_bytes) as writer, progress.task("write weights", total) as advance:
        for name, shape in shapes.items():
            table = _table(*_distribution(model, name), dtype)
            done = 0
            for block in _random_blocks(seed, name, math.prod(shape), table):
                writer.write_flat(name, done, block)
                done += block.size
                advance(block.nbytes)


def _write_tokenizer(config: dict[str, Any], folder: Path, *, renamed_eos: bool) -> None:
    """Write a tokenizer, and set the special ids in `config` where they are absent or outside the vocabulary.

    The layout is OLMoE's where config.json has an end token and no begin token, else Gemma's, which Fox-1 uses.
    """
    vocab = config["vocab_size"]
    # OLMoE has 50304 rows, 24 more than its tokenizer has entries, so that a model may produce ids without a token.
    size = vocab - 24 if vocab >= synth_tokenizer.FULL_LAYOUT_SIZE else vocab
    if family(config).name == "olmoe" or ("eos_token_id" in config and "bos_token_id" not in config):
        eos = config.get("eos_token_id")
        if not isinstance(eos, int) or not 1 < eos < size:
            eos = size - 1
        config |= {"eos_token_id": eos, "pad_token_id": 1}
        synth_tokenizer.write_olmoe_tokenizer(folder, size, eos, renamed_eos=renamed_eos)
        generation = {"eos_token_id": eos, "pad_token_id": 1}
    else:
        # As published: wrong, Gemma's bos is 2 and its eos 1.
        config |= {"bos_token_id": 1, "eos_token_id": 2}
        synth_tokenizer.write_gemma_tokenizer(folder, vocab)
        generation = {"bos_token_id": 1, "eos_token_id": 2}
    _dump_json(folder / "generation_config.json", {"_from_model_config": True, **generation})


def _dump_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8", newline="\n")


def _write(
    config: dict[str, Any],
    out: Path,
    seed: int,
    shard_bytes: int | None,
    dtype: str,
    progress: Progress,
    *,
    renamed_eos: bool,
    overwrite: bool = False,
) -> Path:
    if dtype not in PUBLISHED_DTYPE:
        raise CheckpointError(f"dtype {dtype!r} is not one of {', '.join(PUBLISHED_DTYPE)}")
    with atomic_directory(out, CHECKPOINT, overwrite=overwrite) as folder:
        _write_tokenizer(config, folder, renamed_eos=renamed_eos)
        _dump_json(folder / "config.json", config)
        _write_weights(config, folder, seed, shard_bytes, dtype, progress)
    return out


def write_random_checkpoint(
    config: Mapping[str, Any],
    out: Path | str,
    seed: int = 0,
    shard_bytes: int | None = None,
    dtype: str = "BF16",
    progress: Progress | None = None,
) -> Path:
    """Write a complete random checkpoint of any supported config: weights, config.json and a tokenizer.

    The special ids have the two errors of published checkpoints. With an OLMoE config, the token at the end token's id
    is `|||IP_ADDRESS|||`, and `<|endoftext|>` is another token. With a Fox config, bos and eos are swapped in
    config.json and generation_config.json. For `vocab_size` of 1024 or more, OLMoE's tokenizer has 24 entries fewer.

    Args:
        config: contents of config.json; the fields of special ids may be absent.
        out: the folder to write, which must not exist.
        seed: seed of the weights; the same seed gives the same bytes.
        shard_bytes: largest size of a weight file; None for a single file.
        dtype: "BF16", "F16" or "F32".
        progress: where to report the bytes written.

    Returns:
        The folder.

    Raises:
        CheckpointError: the config is not supported or the dtype is unknown.
        EdgeLMError: the folder exists, or the disk is full.
    """
    written = {**config, "torch_dtype": PUBLISHED_DTYPE.get(dtype)}
    return _write(written, Path(out), seed, shard_bytes, dtype, progress or Silent(), renamed_eos=True)


def synth(
    name: str, out: Path | str, seed: int = 0, progress: Progress | None = None, *, overwrite: bool = False
) -> Path:
    """Write a full-size random checkpoint with the keys, dtype, sharding and config.json of the published one.

    Args:
        name: one of `PUBLISHED`: "olmoe-1b-7b" (13.8 GB, as OLMoE-1B-7B-0924), "fox-1-1.6b" (3.3 GB), ...
        out: the folder to write.
        seed: seed of the weights; the same seed gives the same bytes.
        progress: where to report the bytes written.
        overwrite: replace a checkpoint that EdgeLM wrote.

    Raises:
        CheckpointError: the name is unknown.
        EdgeLMError: the folder exists, or the disk is full.
    """
    if name not in PUBLISHED:
        raise CheckpointError(f"no model {name!r} to make; there are {', '.join(PUBLISHED)}")
    config = dict(PUBLISHED[name])
    return _write(
        config, Path(out), seed, SHARD_BYTES, "BF16", progress or Silent(), renamed_eos=False, overwrite=overwrite
    )
