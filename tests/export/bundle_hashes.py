"""Are exported bundles still the ones that were recorded? `python tests/export/bundle_hashes.py --check` or `--write`.

Both tiny checkpoints are exported with every preset, operator set and target. Further cases are calibrated, smoothed,
with attention inside TensorRT's engine, from quantised checkpoints, in mixed precision, and from generated checkpoints
with features that the tiny ones do not have. bundle_hashes.json records every file, or the error of a combination that
is refused. `--keep FOLDER` keeps the bundles.

Recorded for each file:

- SHA-256 of all bytes, shortened to 64 bits, if the file depends neither on versions nor on floating-point sums.
- For graphs and program.json also a hash of their *structure*, and the number of nodes per operator. The structure
  ignores all names except those of the graph's inputs and outputs, and the order of nodes; weights count by their
  bytes. A graph in which only names changed is reported as such.
- manifest.json by its parts, without `files`, `tools` and `created`; parity/pack.json without `made_with`.
- Kernels are not compiled, since their bytes contain NVRTC's version. The request to the compiler is recorded instead.
- parity/pack.npz and the router probe hold sums of PyTorch and NumPy, whose last bits depend on the CPU's instruction
  set (by 1e-6 of the values between AVX-512, AVX2 and neither). Their integers are compared exactly. For each float
  array the root mean square and a sum with random signs are compared, with the tolerance `SUMS`, or `ROUNDED_SUMS` if
  activations are rounded to int8, which can differ by 1e-2 of a sum.
- Calibrated weights depend on such sums too, when two codes are equally good. The size of the file and the frequency
  of each half-byte value are compared, with the tolerance `CALIBRATED`; sums of their some 25 logits, which differ by
  0.12 between an AMD and an Intel CPU, with `CALIBRATED_SUMS`.
- Everything else is the same with AVX-512, AVX2 and SSE (tested with EDGELM_ISA, NPY_DISABLE_CPU_FEATURES,
  ATEN_CPU_CAPABILITY and MKL_CBWR).
- On a machine like the recording one (`machine`: CPU, PyTorch, NumPy) all files must be the same bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import platform
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import torch
from format_writers import STYLES, linear, write_format
from numpy.typing import NDArray
from onnx import helper
from tiny_models import CONFIGS

from edgelm.errors import EdgeLMError
from edgelm.export import ExportOptions, export_bundle
from edgelm.export.tensorrt.options import EngineOptions
from edgelm.parity.golden import GoldenOptions
from edgelm.parity.prompts import Prompt
from edgelm.quant.calibration import CalibrationOptions
from edgelm.quant.checkpoint import quantize_checkpoint
from edgelm.quant.recipe import Recipe
from edgelm.runtimes.onnxruntime.router_probe import PROBE_FILE
from edgelm.synth import write_random_checkpoint

RECORDED = Path(__file__).with_suffix(".json")
CHECKPOINTS = Path(__file__).parents[2] / "examples" / "checkpoints"
MODELS, PRESETS = ("olmoe", "fox"), ("int4", "int8", "fp8", "none")
TARGETS, OPERATOR_SETS = ("cpu", "cuda", "tensorrt"), ("native", "portable")
SUMS, ROUNDED_SUMS, CALIBRATED_SUMS, CALIBRATED = 1e-4, 0.05, 0.25, 0.01
"""Allowed change of a sum, as a part of what sums of as many random numbers are; and of the share of a half byte."""

_GOLDEN = GoldenOptions(prompts=(Prompt("code", "def merge(left, right):"), Prompt("b", "import os")), greedy_tokens=3)
_MIXED = """
name = "mixed"
default = "int4-g32-sym"
kv = "int8"
[[rule]]
match = "*.mlp.gate.weight"
scheme = "float"
[[rule]]
match = "model.layers.0.*"
scheme = "int8-g64-sym"
[[rule]]
match = "*.down_proj.weight"
scheme = "int6-g32-sym"
[[rule]]
match = "*.o_proj.weight"
scheme = "float"
"""
_FP8_TOKEN = 'name = "fp8-token"\ndefault = "fp8-row"\nactivations = "fp8-token"\n' + "".join(
    f'[[rule]]\nmatch = "{pattern}"\nscheme = "float"\n' for pattern in ("*embed_tokens*", "*.mlp.gate.weight")
)
# Features that the tiny checkpoints do not have: clipped and grouped attention, a normalised MoE, an untied embedding.
_UNUSUAL = {
    "olmoe": {"clip_qkv": 0.5, "num_key_value_heads": 2, "norm_topk_prob": True, "tie_word_embeddings": True},
    "fox": {"tie_word_embeddings": False, "num_key_value_heads": 4, "rope_theta": 500000.0},
}
# Calibration takes its time.
_SMALL_DIMS = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
_SMALL = {
    "olmoe": {**_SMALL_DIMS, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2},
    "fox": {**_SMALL_DIMS, "intermediate_size": 128},
}

Record = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One export.

    Attributes:
        name: Name in bundle_hashes.json.
        source: Folder of the checkpoint.
        recipe: Preset or recipe; None for the stored one of a quantised checkpoint.
        options: Options of the export.
        calibration: Options of calibration; None for no calibration.
    """

    name: str
    source: Path
    recipe: str | Recipe | None
    options: ExportOptions
    calibration: CalibrationOptions | None = None


def cases(folder: Path) -> Iterator[Case]:
    """Yield all exports; checkpoints that they need are written into `folder`."""
    for model in MODELS:
        tiny = CHECKPOINTS / f"{model}-tiny"
        for preset in PRESETS:
            for target in TARGETS:
                for ops in OPERATOR_SETS:
                    yield Case(f"{model} {preset} {target} {ops}", tiny, preset, _options(target, ops))
    yield from _special_cases(folder)


def _special_cases(folder: Path) -> Iterator[Case]:
    tiny = {model: CHECKPOINTS / f"{model}-tiny" for model in MODELS}
    native, portable, cuda, gpu = (
        _options(*pair) for pair in (("cpu", "native"), ("cpu", "portable"), ("cuda", "auto"), ("tensorrt", "auto"))
    )
    for model in MODELS:
        engine = replace(gpu, engines=EngineOptions(attention="engine", build=False))
        yield Case(f"{model} int4 tensorrt engine-attention", tiny[model], "int4", engine)
        unusual = write_random_checkpoint({**CONFIGS[model], **_UNUSUAL[model]}, folder / f"{model}-unusual", seed=1)
        for options in (native, portable, cuda, gpu):
            yield Case(f"{model} unusual int4 {options.target} {options.ops}", unusual, "int4", options)
        stored = quantize_checkpoint(tiny[model], folder / f"{model}-stored", Recipe.load("int8")).path
        yield Case(f"{model} stored-int8 cpu native", stored, None, native)
    mixed = _recipe(_MIXED, "olmoe")
    yield Case("olmoe mixed cpu native", tiny["olmoe"], mixed, native)
    yield Case("olmoe mixed tensorrt auto", tiny["olmoe"], mixed, gpu)
    plugins = replace(gpu, dtype="fp16", engines=EngineOptions(matmul="plugin", build=False))
    yield Case("fox fp8-token tensorrt auto", tiny["fox"], _recipe(_FP8_TOKEN, "fox"), gpu)
    yield Case("fox int8 tensorrt fp16 plugins", tiny["fox"], "int8", plugins)
    yield Case("fox none cpu portable fp16", tiny["fox"], "none", replace(portable, dtype="fp16"))
    style = next(style for style in STYLES if style.name == "gptq")
    gptq = write_format(folder / "fox-unusual", folder / "fox-gptq", style, quantise=linear).path
    yield Case("fox gptq cpu native", gptq, None, native)
    yield Case("fox gptq cuda portable", gptq, None, cuda)
    text = folder / "words.txt"
    words = np.random.default_rng(0).choice(["the", "fox", "jumps", "over", "a", "lazy", "dog", "and", "runs"], 1500)
    text.write_text(" ".join(words), encoding="utf-8")
    calibration = CalibrationOptions(text=text, samples=16, length=24)
    smoothed = replace(calibration, smoothing="activations")
    for model in MODELS:
        small = write_random_checkpoint({**CONFIGS[model], **_SMALL[model]}, folder / f"{model}-small", seed=2)
        yield Case(f"{model} small int4 cpu native calibrated", small, "int4", native, calibration)
        yield Case(f"{model} small int8 tensorrt auto smoothed", small, "int8", gpu, smoothed)


def _options(target: str, ops: str) -> ExportOptions:
    sms = (86,) if target == "tensorrt" else None
    return ExportOptions(target=target, ops=ops, sms=sms, engines=EngineOptions(build=False), threads=1, golden=_GOLDEN)


def _recipe(text: str, model: str) -> Recipe:
    router = '[[rule]]\nmatch = "*.mlp.gate.weight"\nscheme = "float"\n'
    return Recipe.from_toml(text if model == "olmoe" else text.replace(router, ""))


def record_all(folder: Path, note: Callable[[str], None] = lambda name: None) -> dict[str, Record]:
    """Export every case into `folder`; return the records, by "case/file", or by "case" if it is refused."""
    found: dict[str, Record] = {}
    with _no_compiler():
        for case in cases(folder):
            note(case.name)
            found |= _record_case(case, folder / "bundles" / case.name.replace(" ", "-"), folder)
    return found


def _record_case(case: Case, out: Path, folder: Path) -> dict[str, Record]:
    try:
        made = export_bundle(case.source, out, recipe=case.recipe, options=case.options, calibration=case.calibration)
    except EdgeLMError as error:
        return {case.name: {"refused": str(error).replace(str(folder), "").replace(str(CHECKPOINTS), "")}}
    exact = case.calibration is None
    return {f"{case.name}/{name}": record for name, record in record_bundle(made.path, exact=exact).items()}


@contextlib.contextmanager
def _no_compiler() -> Iterator[None]:
    """Replace NVRTC by a function that writes the names of the kernels."""

    def write_names(names: Iterable[object], sms: Sequence[int], folder: Path, progress: object = None) -> None:
        del progress
        folder.mkdir()
        (folder / "asked.json").write_text(json.dumps({"names": sorted(map(str, names)), "sms": list(sms)}, indent=1))

    name = "compile_bundle_kernels"
    users = [one for key, one in sorted(sys.modules.items()) if key.startswith("edgelm.export") and hasattr(one, name)]
    assert users, f"no module of edgelm.export uses {name}"
    with contextlib.ExitStack() as stack:
        for user in users:
            stack.enter_context(mock.patch.object(user, name, write_names))
        yield


def record_bundle(folder: Path, *, exact: bool = True) -> dict[str, Record]:
    """Return the record of each file; `exact` says that the weights are the same on every machine."""
    weights = Weights(folder, exact=exact)
    found: dict[str, Record] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        found[name] = _record_file(path, name, weights)
    return found


def _record_file(path: Path, name: str, weights: Weights) -> Record:
    if name == "manifest.json":
        return _record_manifest(json.loads(path.read_text(encoding="utf-8")), exact=weights.exact)
    if name == "parity/pack.npz":
        return _record_pack(path, exact=weights.exact)
    if name == "parity/pack.json":
        return {"sha256": _hash({**json.loads(path.read_text(encoding="utf-8")), "made_with": None})}
    sha = _hash(path.read_bytes())
    if path.suffix == ".data" and not weights.exact:
        return {"bits": sha, "size": path.stat().st_size, "halves": _halves(path)}
    if path.suffix == ".onnx":
        return _record_graph(path, sha, weights)
    if name == "program.json":
        program = json.loads(path.read_text(encoding="utf-8"))
        nodes = Counter(node["op"] for node in program["nodes"])
        found = {"sha256": sha, "structure": structure_of_program(program, weights)}
        return {**found, "nodes": dict(sorted(nodes.items()))}
    return {"sha256": sha}


def _record_graph(path: Path, sha: str, weights: Weights) -> Record:
    model = onnx.load(str(path), load_external_data=False)
    nodes = Counter(f"{node.domain}:{node.op_type}".lstrip(":") for node in model.graph.node)
    found: Record = {"nodes": dict(sorted(nodes.items()))}
    if path.name != PROBE_FILE:
        return {**found, "sha256": sha, "structure": structure_of_graph(model, weights)}
    arrays = {one.name: onnx.numpy_helper.to_array(one) for one in model.graph.initializer}
    structure = structure_of_graph(model, Weights(path.parent, exact=False))
    return {**found, "bits": sha, "structure": structure, **_record_arrays(arrays, SUMS)}


def _record_manifest(manifest: Mapping[str, Any], *, exact: bool) -> Record:
    kept = {key: value for key, value in manifest.items() if key not in ("files", "tools", "created")}
    if not exact:
        kept["tensors"] = [{key: value for key, value in one.items() if key != "crc32"} for one in kept["tensors"]]
    return {key: _hash(value) for key, value in sorted(kept.items())}


def _record_pack(path: Path, *, exact: bool) -> Record:
    with np.load(path) as pack:
        arrays = {name: pack[name] for name in pack}
    return {
        "bits": _hash(path.read_bytes()),
        **_record_arrays(arrays, SUMS if exact else CALIBRATED_SUMS, integers=exact),
    }


def _record_arrays(arrays: Mapping[str, NDArray[Any]], tolerance: float, *, integers: bool = True) -> Record:
    """Return shapes, a hash of integer values, and for each float array the numbers compared with a tolerance."""
    exact: list[Any] = []
    sums: dict[str, list[float]] = {}
    for name, values in sorted(arrays.items()):
        exact.append([name, str(values.dtype), list(values.shape)])
        if values.dtype == np.float32:
            sums[name] = [max(tolerance, ROUNDED_SUMS) if name.startswith("rounded.") else tolerance, *_sums(values)]
        elif integers:
            exact.append(values.tolist())
    return {"exact": _hash(exact), "sums": sums}


def _sums(values: NDArray[Any]) -> list[float]:
    """Return the number of values, their root mean square, and their sum with random signs."""
    flat = values.astype(np.float64).ravel()
    signs = np.random.default_rng(flat.size).choice([-1.0, 1.0], flat.size)
    return [flat.size, *(float(f"{value:.7g}") for value in (np.sqrt(np.mean(flat**2)), flat @ signs))]


def _halves(path: Path) -> list[float]:
    """Return the share of each of the sixteen half-byte values."""
    counts = np.bincount(np.frombuffer(path.read_bytes(), np.uint8), minlength=256).reshape(16, 16)
    return [round(float(share), 5) for share in (counts.sum(0) + counts.sum(1)) / (2 * counts.sum())]


class Weights:
    """Hashes of a bundle's weights by their place in the file; of their sizes if the bytes depend on the machine."""

    def __init__(self, folder: Path, *, exact: bool) -> None:
        self.exact = exact
        self._folder = folder
        self._bytes: dict[str, bytes] = {}
        self._known: dict[tuple[str, int, int], str] = {}

    def at(self, file: str, offset: int, size: int) -> str:
        """Return the hash of a range of a file, or of the range itself if the file is made only on the device."""
        key = (file, offset, size)
        if key not in self._known:
            if file not in self._bytes:
                path = self._folder / file
                self._bytes[file] = path.read_bytes() if path.is_file() else b""
            stored = self._bytes[file][offset : offset + size] or f"{key}".encode()
            self._known[key] = _hash(stored if self.exact else size)
        return self._known[key]


def structure_of_graph(model: onnx.ModelProto, weights: Weights) -> str:
    """Return a hash of a graph that does not depend on names or on the order of nodes.

    Each value is identified by the hash of its operator, the operator's attributes and its inputs.
    """
    versions = sorted((one.domain, one.version) for one in model.opset_import)
    assert not model.functions, "functions are not supported here"
    return _hash([model.ir_version, versions, _graph(model.graph, {}, weights)])


def _graph(graph: onnx.GraphProto, outer: Mapping[str, str], weights: Weights) -> str:
    known = {"": "absent", **outer}
    constants = {one.name: _tensor(one, weights) for one in graph.initializer}
    known |= constants
    known |= {one.name: _hash(["input", one.name, _type(one), constants.get(one.name)]) for one in graph.input}
    nodes = []
    for node in graph.node:
        attributes = sorted((one.name, _attribute(one, known, weights)) for one in node.attribute)
        inputs = [known[name] for name in node.input]
        made = _hash([node.domain, node.op_type, attributes, inputs, len(node.output)])
        nodes.append(made)
        known |= {name: _hash([made, index]) for index, name in enumerate(node.output)}
    types = sorted(_hash([known[one.name], _type(one)]) for one in graph.value_info)
    results = [[one.name, _type(one), known[one.name]] for one in graph.output]
    return _hash([[one.name for one in graph.input], results, sorted(nodes), sorted(constants.values()), types])


def _type(value: onnx.ValueInfoProto) -> str:
    return value.type.SerializeToString(deterministic=True).hex()


def _tensor(tensor: onnx.TensorProto, weights: Weights) -> str:
    place = {entry.key: entry.value for entry in tensor.external_data}
    if place:
        content = weights.at(place["location"], int(place["offset"]), int(place["length"]))
    else:
        values = onnx.numpy_helper.to_array(tensor)
        content = _hash(values.tobytes() if weights.exact or values.dtype != np.float32 else values.size)
    return _hash(["weight", tensor.data_type, list(tensor.dims), content])


def _attribute(attribute: onnx.AttributeProto, known: Mapping[str, str], weights: Weights) -> str:
    if attribute.type == onnx.AttributeProto.GRAPH:
        return _graph(attribute.g, known, weights)
    if attribute.type == onnx.AttributeProto.TENSOR:
        return _tensor(attribute.t, weights)
    value = helper.get_attribute_value(attribute)
    if attribute.name == "name":  # the checkpoint's name of a matrix, which our operators print
        return ""
    if attribute.name == "spec":  # of a plugin of TensorRT
        value = b"\n".join(line for line in value.split(b"\n") if not line.startswith(b"name="))
    return _hash([attribute.type, repr(value)])


def structure_of_program(program: Mapping[str, Any], weights: Weights) -> str:
    """Return the hash of `structure_of_graph` for a GPU program; its outputs are the values that no node reads."""
    known: dict[str, str] = {}
    for name, one in program["weights"].items():
        known[name] = _hash([one["type"], one["dims"], weights.at("model.onnx.data", one["offset"], one["size"])])
    stored, nodes, results = sorted(known.values()), [], []
    taken = {name for node in program["nodes"] for name in node["inputs"]}
    for node in program["nodes"]:
        inputs = [known.get(name, name) for name in node["inputs"]]
        made = _hash([node["op"], node["attrs"], inputs])
        nodes.append(made)
        for index, name in enumerate(node["outputs"]):
            known[name] = _hash([made, index, program["values"].get(name)])
            if name not in taken:
                results.append([name, known[name]])
    rest = {key: value for key, value in program.items() if key not in ("nodes", "values", "weights")}
    return _hash([stored, sorted(nodes), sorted(results), rest])


def _hash(value: Any) -> str:
    data = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()[:16]


def differences(recorded: Mapping[str, Record], found: Mapping[str, Record], *, bits: bool) -> Iterator[str]:
    """Return the differences, one line each; with `bits` the last bits of sums must agree too."""
    before, after = ({key.partition("/")[0] for key in records} for records in (recorded, found))
    yield from (f"{case}: is exported no longer" for case in sorted(before - after))
    yield from (f"{case}: is new" for case in sorted(after - before))
    for key in sorted({*recorded, *found}):
        if key.partition("/")[0] not in before & after:
            continue
        if key not in found:
            yield f"{key}: {'no longer refused' if 'refused' in recorded[key] else 'missing'}"
        elif key not in recorded:
            yield f"{key}: {'refused: ' + found[key]['refused'] if 'refused' in found[key] else 'new'}"
        elif recorded[key] != found[key]:
            text = _difference(recorded[key], found[key], bits=bits)
            if text:
                yield f"{key}: {text}"


def _difference(was: Record, now: Record, *, bits: bool) -> str:
    if set(was) != set(now):
        return f"parts {', '.join(sorted(set(was) ^ set(now)))} came or went"
    if "refused" in was:
        return f"refused otherwise:\n    {was['refused']}\n    {now['refused']}"
    found = [*_graph_differences(was, now), *_array_differences(was, now)]
    if "halves" in was:
        far = max(abs(a - b) for a, b in zip(was["halves"], now["halves"], strict=True))
        if was["size"] != now["size"] or far > CALIBRATED:
            found.append(f"{was['size']} -> {now['size']} bytes, shares of half bytes off by up to {far:.4f}")
    told = {"bits", "structure", "nodes", "sha256", "sums", "size", "halves"}
    parts = [part for part in was if part not in told and was[part] != now[part]]
    if parts:
        found.append(f"{', '.join(parts)} differ")
    if not found and was.get("sha256") != now.get("sha256"):
        found.append("only names or the order of nodes differ" if "structure" in was else "bytes differ")
    if not found and bits and was.get("bits") != now.get("bits"):
        found.append("the last bits of floats differ, within the tolerance")
    return "; ".join(found)


def _graph_differences(was: Record, now: Record) -> Iterator[str]:
    if was.get("structure") != now.get("structure"):
        counts = Counter(was["nodes"]), Counter(now["nodes"])
        changed = [f"{op} {counts[0][op]} -> {counts[1][op]}" for op in sorted(counts[0] | counts[1])
                   if counts[0][op] != counts[1][op]]  # fmt: skip
        yield f"STRUCTURE differs: {', '.join(changed) or 'the same nodes, but other attributes, weights or edges'}"


def _array_differences(was: Record, now: Record) -> Iterator[str]:
    before, after = was.get("sums", {}), now.get("sums", {})
    for name in sorted({*before, *after}):
        if name not in before or name not in after:
            yield f"{name} came or went"
            continue
        (tolerance, count, rms, total), (_, _, rms_now, total_now) = before[name], after[name]
        if max(abs(rms_now - rms), abs(total_now - total) / np.sqrt(count)) > tolerance * rms:
            yield f"{name}: rms {rms} -> {rms_now}, sum {total} -> {total_now}"


def machine() -> str:
    """Return a hash of everything that the last bits of sums depend on."""
    lines: Iterable[str] = ()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    kinds = ("vendor_id", "cpu family", "model\t", "flags")
    cpu = [platform.machine(), *(line for line in lines if line.startswith(kinds))]
    return _hash([cpu, torch.__version__, torch.backends.cpu.get_cpu_capability(), np.__version__])


def read_recorded() -> tuple[str, dict[str, Record]]:
    """Return the hash of the recording machine, and the records."""
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    return recorded.pop("machine"), recorded


def check(folder: Path, note: Callable[[str], None] = lambda name: None) -> list[str]:
    """Export everything into `folder`; return the differences."""
    where, recorded = read_recorded()
    return list(differences(recorded, record_all(folder, note), bits=where == machine()))


def write(folder: Path, note: Callable[[str], None] = lambda name: None) -> None:
    """Export everything and write the records."""
    lines = {"machine": machine(), **dict(sorted(record_all(folder, note).items()))}
    text = ",\n".join(f"{json.dumps(key)}: {json.dumps(value, sort_keys=True)}" for key, value in lines.items())
    RECORDED.write_text("{\n" + text + "\n}\n", encoding="utf-8")


def main() -> int:
    """Parse the command line; return 1 if something differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with bundle_hashes.json (the default)")
    parser.add_argument("--write", action="store_true", help="record in bundle_hashes.json what is exported now")
    parser.add_argument("--keep", type=Path, help="leave checkpoints and bundles in this new folder")
    given = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = given.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=given.keep is None)

        def note(name: str) -> None:
            if sys.stderr.isatty():
                print(f"\r\033[K{name}\r", end="", file=sys.stderr, flush=True)

        if given.write:
            write(folder, note)
            found = []
        else:
            found = check(folder, note)
    print("\n".join(found) or ("recorded" if given.write else "the same"))
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
