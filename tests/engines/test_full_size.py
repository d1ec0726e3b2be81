"""Is an engine of full-size Fox-1 built in reasonable time and memory without a GPU?

Its weights are zeros in a sparse file: TensorRT's work depends only on shapes and sizes.
"""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_folders import index_only

from edgelm.bundle import ModelInfo
from edgelm.checkpoint import Checkpoint
from edgelm.export.plan import WEIGHTS_FILE, GraphRequest
from edgelm.export.tensorrt.engines import tensorrt_graph
from edgelm.export.tensorrt.options import EngineOptions
from edgelm.export.tensorrt.target import TensorrtTarget
from edgelm.models import decoder as decoder_of
from edgelm.quant.recipe import Recipe
from edgelm.quant.source import WeightSource
from edgelm.runtimes.cuda.kernels.images import FOLDER
from edgelm.runtimes.cuda.program import PROGRAM_FILE, Program
from edgelm.runtimes.tensorrt.build import GRAPH_FILE, RECIPE_FILE
from edgelm.runtimes.tensorrt.engine_info import plugins_in
from edgelm.synth import PUBLISHED

SMS = (86, 89, 120)
BUILD = """
import json, resource, sys
from pathlib import Path
from edgelm.progress import Silent
from edgelm.runtimes.cuda.kernels.images import FOLDER
from edgelm.runtimes.cuda.program import PROGRAM_FILE, Program
from edgelm.runtimes.tensorrt.build import build_into
from edgelm.runtimes.tensorrt.builder import BuildOptions
from edgelm.runtimes.tensorrt.library import load
folder, weights, *sms = sys.argv[1:]
sms = tuple(map(int, sms))
info = build_into(Path(folder), weights, load("tensorrt-rtx"), BuildOptions(sms), sms, Silent())
status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
anonymous = int(status["RssAnon"].split()[0])
print(json.dumps({"file": info.file, "operators": info.operators, "seconds": info.seconds, "anonymous": anonymous}))
"""


def sparse_checkpoint(folder: Path) -> Checkpoint:
    """Write Fox-1's config and tensors, all zeros in a sparse file."""
    config = dict(PUBLISHED["fox-1-1.6b"])
    (folder / "config.json").write_text(json.dumps(config))
    shapes = decoder_of(config).tensor_shapes
    header, place = {}, 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + place)
    return Checkpoint.open(folder)


@pytest.mark.parametrize("recipe", ["none", "int4"])
def test_full_size_fox(tmp_path: Path, recipe: str) -> None:
    (tmp_path / "source").mkdir()
    checkpoint = sparse_checkpoint(tmp_path / "source")
    decoder = checkpoint.decoder
    source, info = WeightSource(checkpoint, Recipe.load(recipe), threads=1), ModelInfo.of(decoder, "fox")
    graphs = TensorrtTarget().build(GraphRequest(source, decoder, info, "gpu", "bfloat16"))
    program = Program.from_json(graphs.files[PROGRAM_FILE], PROGRAM_FILE)
    made = tensorrt_graph(program, info, WEIGHTS_FILE, EngineOptions(matmul="plugin"), SMS)
    (tmp_path / GRAPH_FILE).write_bytes(made.model.SerializeToString())
    (tmp_path / RECIPE_FILE).write_text(made.recipe.to_json())
    index_only([], SMS, tmp_path / FOLDER)
    with (tmp_path / WEIGHTS_FILE).open("wb") as stream:
        stream.truncate(graphs.weights.size)
    command = [sys.executable, "-c", BUILD, tmp_path, WEIGHTS_FILE, *map(str, SMS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    engine = tmp_path / found["file"]
    assert engine.stat().st_size < graphs.weights.size + (64 << 20)
    layers = {spec.name for spec in plugins_in(engine) if spec.op == "GroupQueryAttention"}
    assert layers == {f"layers.{i}.attn" for i in range(decoder.num_layers)}
    assert found["operators"]["QuantLinear"] == 4 * decoder.num_layers + 1
    assert found["anonymous"] < 1 << 20  # KiB: neither the weights nor the engine were entirely in memory
    engine.unlink()
