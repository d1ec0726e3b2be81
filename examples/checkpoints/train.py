"""Train the two tiny checkpoints of this folder on the sources of Python's standard library.

    python examples/checkpoints/train.py olmoe-tiny
    python examples/checkpoints/train.py fox-tiny

This needs the extra `export`, and about an hour on one core for each. The README.md of each folder has the exact
commands.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))  # the modules beside this script

from corpus import read_corpus
from router_losses import load_balancing_loss, router_z_loss
from vocabularies import FOX_TOKENS, OLMOE_TOKENS, Encode, fox_tokenizer, olmoe_tokenizer, write_json

from edgelm.checkpoint.written import CHECKPOINT
from edgelm.files import atomic_directory
from edgelm.models import decoder as decoder_of
from edgelm.output_paths import check_output
from edgelm.reference.kv_cache import Trace
from edgelm.reference.module import ReferenceModel

OLMOE_TINY: dict[str, Any] = {
    "architectures": ["OlmoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "clip_qkv": None,
    "eos_token_id": OLMOE_TOKENS - 1,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initializer_range": 0.02,
    "intermediate_size": 64,
    "max_position_embeddings": 512,
    "model_type": "olmoe",
    "norm_topk_prob": False,
    "num_attention_heads": 4,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "pad_token_id": 1,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.01,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 2048,
}
FOX_TINY: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,  # wrong, as in the published Fox: the tokenizer says bos 2, eos 1
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.02,
    "intermediate_size": 512,
    "max_position_embeddings": 512,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 8,
    "num_hidden_layers": 6,
    "num_key_value_heads": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": FOX_TOKENS,
}
LENGTH, LONG_LENGTH, TOKENS_PER_STEP = 256, 512, 2048
Z_LOSS = 0.001  # coefficient of the router z-loss, as OLMoE was trained


@dataclass(frozen=True)
class Corpus:
    """Token streams, in which every document ends with the end-of-text token."""

    training: Tensor  # int64 [tokens]
    held_out: Tensor
    held_out_bytes: int
    bos: int | None  # put before every sequence, if the model expects it


@dataclass
class Phase:
    """One run of this script. The next one starts from its weights with a new optimiser and schedule."""

    steps: int
    lr: float
    balance: float
    minutes: float


@dataclass
class Result:
    """The measurements in the README of a checkpoint."""

    nats: float
    unigram_nats: float
    bits_per_byte: float
    parameters: int
    routing: list[dict[str, float]] = field(default_factory=list)


def build_corpus(encode: Encode, training: list[str], held_out: list[str], bos: int | None) -> Corpus:
    """Encode all documents into two streams."""
    streams = [torch.tensor([i for text in texts for i in encode(text)]) for texts in (training, held_out)]
    return Corpus(streams[0], streams[1], sum(len(text.encode()) for text in held_out), bos)


def batch(corpus: Corpus, length: int, generator: torch.Generator) -> Tensor:
    """Return random crops [B, length + 1] of the training stream, with B * length = TOKENS_PER_STEP."""
    starts = torch.randint(len(corpus.training) - length, (TOKENS_PER_STEP // length,), generator=generator)
    ids = torch.stack([corpus.training[s : s + length + 1] for s in starts.tolist()])
    if corpus.bos is not None:
        ids[:, 0] = corpus.bos
    return ids


def init_weights(model: ReferenceModel, generator: torch.Generator) -> None:
    """Draw normal weights with a standard deviation of 1/sqrt(inputs), or 0.02 for embedding and routers.

    Matrices that write to the residual stream are scaled by 1/sqrt(2 L) for L layers. Norms stay one.
    """
    for matrix in model.decoder.matrices.values():
        std = 0.02 if matrix.role in ("embedding", "router") else matrix.columns**-0.5
        if matrix.role in ("o", "down"):
            std /= math.sqrt(2 * model.decoder.num_layers)
        nn.init.normal_(model.read(matrix.name), std=std, generator=generator)


def learning_rate(progress: float, peak: float) -> float:
    """Return the learning rate: linear warm-up over 2 % of the steps, then a cosine to a hundredth of the peak."""
    warm = 0.02
    if progress < warm:
        return peak * (progress + 1e-4) / warm
    return peak * (0.01 + 0.99 * (1 + math.cos(math.pi * min(1.0, (progress - warm) / (1 - warm)))) / 2)


@torch.no_grad()
def evaluate(model: nn.Module, corpus: Corpus, active: int, windows: int | None = None) -> Result:
    """Return the held-out loss over adjacent windows of LENGTH tokens, and statistics of the routing."""
    usable = corpus.held_out[: (len(corpus.held_out) - 1) // LENGTH * LENGTH + 1]
    inputs, targets = usable[:-1].view(-1, LENGTH).clone(), usable[1:].view(-1, LENGTH)
    if corpus.bos is not None:  # the first target then follows only the bos token
        inputs[:, 0] = corpus.bos
    step = 1 if windows is None else max(1, len(inputs) // windows)
    inputs, targets = inputs[::step], targets[::step]
    total, loads, weight_sums = 0.0, torch.zeros(0), torch.zeros(0)
    for x, y in zip(torch.split(inputs, 8), torch.split(targets, 8), strict=True):
        trace = Trace()
        logits = model(x, trace=trace)
        total += float(F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum"))
        if trace.experts:
            experts = trace.router_logits[0].shape[-1]
            counts = torch.stack([torch.bincount(e.flatten(), minlength=experts).float() for e in trace.experts])
            sums = torch.stack([w.sum() for w in trace.expert_weights])
            loads = loads + counts if len(loads) else counts
            weight_sums = weight_sums + sums if len(weight_sums) else sums
    nats = total / targets.numel()
    routing = []
    for load, weights in zip(loads, weight_sums, strict=True):
        share = load / load.sum()
        entropy = float(-(share * share.clamp_min(1e-12).log()).sum()) / math.log(len(share))
        routing.append(
            {
                "load_entropy": entropy,
                "most_loaded": float(share.max() * len(share)),
                "least_loaded": float(share.min() * len(share)),
                "weight_sum": float(weights * active / load.sum()),
            }
        )
    vocabulary = int(max(corpus.training.max(), corpus.held_out.max())) + 1
    frequencies = torch.bincount(corpus.training, minlength=vocabulary) + 1.0  # add-one smoothing
    unigram = float(-(frequencies / frequencies.sum()).log()[corpus.held_out].mean())
    bits_per_byte = nats / math.log(2) * len(corpus.held_out) / corpus.held_out_bytes
    return Result(nats, unigram, bits_per_byte, sum(p.numel() for p in model.parameters()), routing)


def train(model: nn.Module, corpus: Corpus, options: argparse.Namespace, save: Any, active: int, seed: int) -> int:
    """Train with AdamW on random crops, longer ones in the last fifth of the steps; return the number of steps."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95), fused=True)
    generator = torch.Generator().manual_seed(seed)
    start = saved = time.monotonic()
    average, step = None, 0
    while True:
        elapsed = (time.monotonic() - start) / 60
        progress = max(step / options.steps, elapsed / options.minutes)
        if progress >= 1:
            return step
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, options.lr)
        ids = batch(corpus, LENGTH if progress < 0.8 else LONG_LENGTH, generator)
        trace = Trace()
        # A dense model can be trained with bfloat16 matmuls. A MoE cannot, because of its router's choices.
        precision = contextlib.nullcontext() if active else torch.autocast("cpu", torch.bfloat16)
        with precision:
            logits = model(ids[:, :-1], trace=trace)
        loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        if active:
            loss = loss + options.balance * load_balancing_loss(trace.router_logits, active)
            loss = loss + Z_LOSS * router_z_loss(trace.router_logits)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no types for it
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 50 == 0:
            print(f"step {step} of {options.steps}, {elapsed:.1f} min, training loss {average:.3f}", flush=True)
        if time.monotonic() - saved > 420:
            result = evaluate(model, corpus, active, windows=40)
            print(f"step {step}: held-out loss {result.nats:.3f}, {result.routing}", flush=True)
            save(step)
            saved = time.monotonic()


def save_checkpoint(out: Path, model: nn.Module, config: Mapping[str, Any], tokenizer_files: Sequence[Path]) -> None:
    """Write the files of the checkpoint folder except its README."""
    for path in tokenizer_files:
        (out / path.name).write_bytes(path.read_bytes())
    write_json(out / "config.json", config)
    token_ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
    write_json(out / "generation_config.json", {"_from_model_config": True, **token_ids})
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.tensors()}  # type: ignore[operator]
    save_file(tensors, str(out / "model.safetensors"), metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # save_file makes it readable for the owner only


def restore(model: nn.Module, folder: Path) -> None:
    """Load the model's weights from a checkpoint folder."""
    stored = load_file(str(folder / "model.safetensors"))
    model.load_weights(lambda name: stored[name].float().numpy())  # type: ignore[operator]


def readme(name: str, result: Result, phases: Sequence[Phase], corpus: Corpus) -> str:
    """Return the model card; every number was measured on the written file."""
    size = {"olmoe-tiny": "4 layers, hidden 128, 4 heads, 32 experts of width 64, top-4, QK-norm, untied head"}
    size["fox-tiny"] = "6 layers, hidden 256, 8 query and 2 key/value heads of 32, width 512, tied head"
    steps = sum(phase.steps for phase in phases)
    lines = [
        f"# {name}",
        "",
        f"{size[name]}: {result.parameters:,} parameters in bfloat16.",
        "A model for testing quantisation and parity. It was trained for an hour on one core, on the sources of",
        "Python's standard library only.",
        "",
        "| held out | |",
        "|---|---|",
        f"| loss | **{result.nats:.3f} nats per token**, {result.bits_per_byte:.3f} bits per byte |",
        f"| unigram model of the training tokens | {result.unigram_nats:.3f} nats per token |",
        f"| held-out text | {len(corpus.held_out):,} tokens, {corpus.held_out_bytes:,} bytes: files whose path's "
        "SHA-256 (first 8 hex digits) is divisible by 20 |",
        "",
        "## Training",
        "",
        f"{len(corpus.training):,} tokens of the standard library of Python {platform.python_version()} (no tests, no "
        "tables);",
        f"{steps:,} steps of {TOKENS_PER_STEP} tokens in crops of {LENGTH} (the last fifth of a run: {LONG_LENGTH}), "
        f"{steps * TOKENS_PER_STEP / len(corpus.training):.1f} epochs.",
        "AdamW (0.9, 0.95) with warm-up and cosine, weight decay 0.1, gradient norm 1;",
        f"{sum(phase.minutes for phase in phases):.0f} minutes on a core shared with other work.",
    ]
    if result.routing:
        lines += [
            f"Router losses: load balancing (layer by layer, coefficient below) and z-loss {Z_LOSS}.",
            "",
            "## Routing on the held-out text",
            "",
            "Load entropy is 1 if all experts are chosen equally often, and 0 if always the same ones are. Loads are",
            "multiples of an equal share. The weights of the four chosen experts are not renormalised, so their sum is",
            "below one.",
            "",
            "| layer | load entropy | most loaded | least loaded | sum of the weights |",
            "|---|---|---|---|---|",
        ]
        for i, r in enumerate(result.routing):
            lines.append(
                f"| {i} | {r['load_entropy']:.4f} | {r['most_loaded']:.2f} | {r['least_loaded']:.2f} "
                f"| {r['weight_sum']:.2f} |"
            )
    lines += [
        "",
        "## Reproduce",
        "",
        "The original runs were limited by `--minutes`. Limited by `--steps`, the schedule is the same up to its pace.",
        "",
    ]
    for i, phase in enumerate(phases):
        balance = f" --balance {phase.balance}" if result.routing else ""
        resume = " --resume" if i else ""
        lines.append(
            f"    python examples/checkpoints/train.py {name} --steps {phase.steps} --lr {phase.lr}{balance}{resume}"
        )
    lines.append("")
    if name == "fox-tiny":
        lines += [
            "config.json and generation_config.json have bos 1 and eos 2, but the tokenizer has eos 1 and bos 2. This",
            "is intended: the published Fox-1 has the same contradiction, which a loader has to resolve.",
            "",
        ]
    return "\n".join(lines)


def main() -> None:
    """Train one checkpoint and write its folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("name", choices=("olmoe-tiny", "fox-tiny"))
    parser.add_argument("-o", "--out", type=Path, help="default: a folder of that name beside this script")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="shorten the schedule to this wall time")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument(
        "--balance",
        type=float,
        default=0.01,
        help="coefficient of the load-balancing loss, in transformers' scale (balanced routing has a loss of A, the "
        "number of chosen experts)",
    )
    parser.add_argument("--every", type=int, default=1, metavar="N", help="take every Nth file only, for a quick trial")
    parser.add_argument("--resume", action="store_true", help="start from the checkpoint that is there")
    options = parser.parse_args()
    out = options.out or Path(__file__).parent / options.name
    check_output(out, CHECKPOINT, overwrite=True)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    config_json = OLMOE_TINY if options.name == "olmoe-tiny" else FOX_TINY
    texts, held_out_texts = (files[:: options.every] for files in read_corpus())
    with tempfile.TemporaryDirectory() as scratch:
        make = olmoe_tokenizer if options.name == "olmoe-tiny" else fox_tokenizer
        encode = make(texts, Path(scratch))
        corpus = build_corpus(encode, texts, held_out_texts, None if options.name == "olmoe-tiny" else 2)
        print(f"{len(corpus.training):,} tokens to train on, {len(corpus.held_out):,} held out", flush=True)
        decoder = decoder_of(config_json)
        model = ReferenceModel(decoder)
        init_weights(model, torch.Generator().manual_seed(0))
        phases: list[Phase] = []
        if options.resume:
            restore(model, out)
            phases = [Phase(**phase) for phase in json.loads((out / "training.json").read_text(encoding="utf-8"))]
        active = decoder.active_experts
        files = sorted(Path(scratch).iterdir())
        start = time.monotonic()

        def save(step: int) -> None:
            with atomic_directory(out, CHECKPOINT, overwrite=True) as folder:
                save_checkpoint(folder, model, config_json, files)
                (folder / "README.md").write_text(f"# {options.name}\n\nUnfinished: {step} steps.\n", encoding="utf-8")

        steps = train(model, corpus, options, save, active, seed=1 + len(phases))
        phases.append(Phase(steps, options.lr, options.balance, round((time.monotonic() - start) / 60, 1)))
        with atomic_directory(out, CHECKPOINT, overwrite=True) as folder:
            save_checkpoint(folder, model, config_json, files)
            write_json(folder / "training.json", [vars(phase) for phase in phases])
            restore(model, folder)  # measure the written file, which is bfloat16
            result = evaluate(model, corpus, active)
            (folder / "README.md").write_text(readme(options.name, result, phases, corpus), encoding="utf-8")
        print(result, flush=True)


if __name__ == "__main__":
    main()
