"""Are the plans of nodes in C++ those of Python, byte for byte?"""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from edgelm.checkpoint import Checkpoint
from edgelm.errors import EdgeLMError
from edgelm.export.plan import GraphRequest, model_info
from edgelm.export.tensorrt.target import TensorrtTarget
from edgelm.models import decoder as decoder_of
from edgelm.quant.recipe import Recipe
from edgelm.quant.source import WeightSource
from edgelm.runtimes.cuda import planning
from edgelm.runtimes.cuda.device import DeviceInfo
from edgelm.runtimes.cuda.operators import KV_CODES, Operators, Scratch, Step, _kernels
from edgelm.runtimes.cuda.planning import Field
from edgelm.runtimes.cuda.program import PROGRAM_FILE, Node, Program
from edgelm.synth import PUBLISHED

SMS = [(80, 108), (86, 28), (86, 84), (87, 16), (89, 58), (89, 128), (90, 132), (100, 148), (110, 20), (120, 84),
       (120, 170)]  # fmt: skip
DEVICES = [DeviceInfo("", divmod(sm, 10), count, 0, (0, 0)) for sm, count in SMS]
CHECKPOINTS = Path(__file__).parents[2] / "examples" / "checkpoints"
TOKENS = (*range(1, 36), 63, 64, 65, 100, 127, 128, 129, 255, 256, 500, 512, 777, 1024, 2048)


def outcome(call: Callable[..., Any], *args: Any) -> Any:
    """The result of a call, or the class and message of its error."""
    try:
        return call(*args)
    except EdgeLMError as error:
        return type(error), str(error)


def sparse_checkpoint(folder: Path, name: str) -> Checkpoint:
    """Write a published config and its tensors, all zeros in a sparse file."""
    folder.mkdir(exist_ok=True)
    config = dict(PUBLISHED[name])
    (folder / "config.json").write_text(json.dumps(config))
    header, place = {}, 0
    for tensor, shape in decoder_of(config).tensor_shapes.items():
        size = 2 * math.prod(shape)
        header[tensor] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + place)
    return Checkpoint.open(folder)


def program_of(folder: Path, model: str, recipe: str, dtype: str) -> Program:
    """The program of a tiny checkpoint, or of a published model in full size."""
    tiny = CHECKPOINTS / model
    checkpoint = Checkpoint.open(tiny) if tiny.exists() else sparse_checkpoint(folder / model, model)
    decoder = checkpoint.decoder
    source = WeightSource(checkpoint, Recipe.load(recipe), threads=1)
    info = model_info(decoder, model.split("-")[0])
    graphs = TensorrtTarget().build(GraphRequest(source, decoder, info, "gpu", dtype))
    return Program.from_json(graphs.files[PROGRAM_FILE], PROGRAM_FILE)


def variants(program: Program) -> list[Program]:
    """The program, with the activations of FP8 matrices rounded, and its debug program."""
    rounded = tuple(
        replace(node, attrs={**node.attrs, "activations": "fp8-token"})
        if "fp8" in (node.attrs.get("kind"), node.attrs.get("gate_up_kind"))
        else node
        for node in program.nodes
    )
    return [program, replace(program, nodes=rounded), program.debug()]


@pytest.mark.parametrize("recipe", ["none", "int4", "int8", "fp8"])
@pytest.mark.parametrize("model", ["fox-tiny", "olmoe-tiny", "fox-1-1.6b", "olmoe-1b-7b"])
def test_nodes(tmp_path: Path, model: str, recipe: str) -> None:
    rng = random.Random(model + recipe)
    for dtype in ("bfloat16", "float16"):
        for program in variants(program_of(tmp_path, model, recipe, dtype)):
            for _ in range(12 if "tiny" in model else 4):
                debug = program.values["logits"].type == program.nodes[1].attrs["activation"]
                check_program(program, "float32" if debug else rng.choice([*list(KV_CODES)[:2], "int8", "fp8"]), rng)


def check_program(program: Program, kv: str, rng: random.Random) -> None:
    """Compare the plans of every node for a step of random size, with random addresses."""
    info, capacity = rng.choice(DEVICES), rng.choice((64, 128, 512, 2048))
    operators = Operators(program, kv, capacity, info)
    device = {"sm": info.sm, "multiprocessors": info.multiprocessors}
    step = Step(rng.choice((1, 1, 2, 5, 8, 32)), rng.choice([t for t in TOKENS if t <= capacity]))
    scratch = Scratch(256 * rng.randrange(1, 1 << 40), rng.choice((0, 4096)))
    kinds: set[object] = set()
    for node in program.nodes:
        at = {"": 0} | {name: 256 * rng.randrange(1, 1 << 40) for name in (*node.inputs, *node.outputs) if name}
        fields = {**operators.fields(node, step, at), **device, **asdict(scratch)}
        expected = outcome(operators.launches, node, step, at, scratch)
        assert outcome(planning.launches, "node_launches", fields) == expected, (node, step)
        kind = tuple(sorted(node.attrs.items())), node.op
        if kind not in kinds:
            kinds.add(kind)
            names = planning.call("node_kernels", fields).decode().split()
            assert names == kernels_of(program, node, kv)
            if isinstance(expected, list):
                assert {launch.kernel for launch in expected} <= set(names)
            batch, tokens = rng.choice(((1, 1), (1, 600), (4, 300), (8, 8), (8, 3)))
            assert outcome(cpp_scratch, fields, batch, tokens, program) == outcome(
                Operators(replace(program, nodes=(node,)), kv, capacity, info).scratch_bytes, batch, tokens
            ), (node, batch, tokens)


def cpp_scratch(fields: dict[str, Field], batch: int, tokens: int, program: Program) -> tuple[int, int]:
    """Bytes of workspace and counters, including those of an argmax, as Python counts them."""
    sizes = planning.call("node_scratch", {**fields, "batch": batch, "tokens": tokens}).split()
    width = program.values["logits"].width
    argmax = int(planning.call("argmax_workspace", {"rows": batch, "columns": width}))
    return max(int(sizes[0]), argmax), int(sizes[1])


def kernels_of(program: Program, node: Node, kv: str) -> list[str]:
    """What Python says that a node needs."""
    names = list(_kernels(replace(program, nodes=(node,)), (KV_CODES[kv],)))[3:]
    return names if node.op != "LastToken" else ["last_token_f32"]
