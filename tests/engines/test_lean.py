"""Does TensorRT itself, not only TensorRT-RTX, load the plugins and call them?

Its full library is not on the public package registry, but its lean runtime is: it has the registry of plugins, which
needs no GPU. By hand, 2026-11-29: 10.15.1.29 and 11.4.0.106.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from edgelm.runtimes.cuda.planning import library_path
from edgelm.runtimes.tensorrt.plugin_spec import plugin_text

LOAD = """
import ctypes, sys
from pathlib import Path
import numpy as np
import tensorrt_lean_libs
for path in Path(tensorrt_lean_libs.__file__).parent.glob("libnvinfer_lean.so.*"):
    ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)  # the bindings open it by its name
from tensorrt_lean_bindings import tensorrt_lean as api
registry = api.get_plugin_registry()
assert registry.load_library(sys.argv[1]) is not None
assert registry.load_library(sys.argv[1]) is None  # a second time
names = sorted(creator.name for creator in registry.all_creators if creator.plugin_namespace == "edgelm")
creator = registry.get_creator("EdgeLMLastToken", "1", "edgelm")
def create(text):
    data = np.frombuffer(text.encode(), np.int8)
    fields = api.PluginFieldCollection([api.PluginField("spec", data, api.PluginFieldType.CHAR)])
    return creator.create_plugin("n", fields, api.TensorRTPhase.BUILD)
print(*names, create(sys.argv[2]) is not None, create("nonsense") is None)
"""


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_lean_libs") is None and os.environ.get("CI") != "true",
    reason="TensorRT's lean runtime is missing: pip install '.[dev]'",
)
def test_tensorrt_loads_the_plugins_and_creates_one() -> None:
    text = plugin_text({"op": "LastToken", "name": "n", "present": "1", "results": "f32:8"})
    command = [sys.executable, "-c", LOAD, str(library_path()), text]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ops = ("GroupQueryAttention", "LastToken", "QuantEmbedding", "QuantLinear", "RMSNorm", "SparseMoE")
    assert done.stdout.split() == [*(f"EdgeLM{op}" for op in ops), "True", "True"]
    assert "edgelm: a plugin has the field nonsense" in done.stderr + done.stdout
