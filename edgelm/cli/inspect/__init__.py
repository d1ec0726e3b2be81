"""`edgelm inspect`: describe a bundle, a checkpoint, or the kernels of this CPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgelm.cli.common.help import option, verb
from edgelm.cli.common.options import PATH, json_option, verbose_option
from edgelm.cli.common.output import echo
from edgelm.errors import EdgeLMError

if TYPE_CHECKING:
    from edgelm.bundle import Bundle, CalibrationInfo, Manifest
    from edgelm.bundle.cpu_layout import PackedMatrix
    from edgelm.cli.inspect.gpu import GpuGroup
    from edgelm.runtimes.onnxruntime.native_library import CpuKernels


@verb(example="edgelm inspect olmoe --verify")
@click.argument("path", type=PATH, required=False)
@option("--verify", is_flag=True, help="Hash every file of a bundle and compare with its manifest.")
@option("--cpu", is_flag=True, help="In place of PATH, show which kernels this CPU runs, and why.")
@verbose_option("Also list versions, attention, files and hashes, and how every matrix is stored.")
@json_option
def inspect(path: Path | None, cpu: bool, verify: bool, verbose: bool, as_json: bool) -> None:
    """Describe the bundle or checkpoint at PATH: model, recipe, size.

    Of a checkpoint it also says whether `edgelm export` takes it, and every reason why not. Exit code 1 if --verify
    finds a difference, or with --cpu if EDGELM_ISA names kernels that cannot be used.
    """
    import json

    from edgelm.bundle import MANIFEST, Bundle
    from edgelm.cli.common.output import pairs
    from edgelm.progress import Bars

    if cpu:
        if path is not None or verify:
            raise click.UsageError("--cpu describes this machine: it takes neither PATH nor --verify")
        inspect_cpu(as_json)
        return
    if path is None:
        raise click.UsageError("Missing argument 'PATH': give the folder of a bundle or a checkpoint, or --cpu")
    if path.is_dir() and not (path / MANIFEST).is_file() and not (path / "config.json").is_file():
        raise EdgeLMError(f"{path} is neither a bundle nor a checkpoint: it has no {MANIFEST} and no config.json")
    if (path / MANIFEST).is_file() or not (path / "config.json").is_file():
        bundle = Bundle.open(path)
        problems = bundle.verify(Bars()) if verify else None
        document, rows = bundle_document(bundle, problems), bundle_rows(bundle, problems, verbose=verbose)
    else:
        from edgelm.cli.inspect.checkpoint import checkpoint_document, checkpoint_rows

        if verify:
            raise click.UsageError("--verify needs a bundle: a checkpoint has no manifest with hashes")
        problems, document = None, checkpoint_document(path)
        rows = checkpoint_rows(document, verbose=verbose)
    if as_json:
        click.echo(json.dumps(document))
    else:
        echo(pairs(rows))
    if problems:
        raise click.exceptions.Exit(1)


def inspect_cpu(as_json: bool) -> None:
    """Print which kernels this CPU runs; exit with 1 if EDGELM_ISA names kernels that it cannot run."""
    import json

    from edgelm import devices
    from edgelm.cli.common.output import pairs
    from edgelm.runtimes.onnxruntime.native_library import describe_cpu

    device, kernels = devices.describe(), describe_cpu()
    document = {"kind": "cpu", "processor": device.cpu, "architecture": device.architecture, **kernels.as_dict()}
    click.echo(json.dumps(document) if as_json else pairs(cpu_rows(f"{device.cpu}, {device.architecture}", kernels)))
    if kernels.library is not None and kernels.chosen is None:
        raise click.exceptions.Exit(1)


def cpu_rows(cpu: str, kernels: CpuKernels) -> list[tuple[str, str]]:
    """Describe the kernels for people."""
    rows = [("CPU", cpu), ("operators", kernels.library or "none"), ("chosen", kernels.why)]
    if kernels.chosen is not None:
        rows[-1] = ("chosen", f"{kernels.chosen}: {kernels.why}")
    for isa in kernels.instruction_sets:
        if isa.name == kernels.chosen:
            state = "in use, forced" if kernels.forced else "in use"
        elif isa.available:
            state = f"available: EDGELM_ISA={isa.name} forces it"
        else:
            state = f"not available: {isa.missing}"
        rows.append((isa.name, state))
    return rows


def bundle_document(bundle: Bundle, problems: list[str] | None) -> dict[str, Any]:
    """The manifest without its table of tensors, and what `Bundle.verify` found."""
    import json

    from edgelm.cli.inspect.gpu import gpu_groups, kernels_document

    manifest = json.loads(bundle.manifest.to_json())
    del manifest["tensors"]
    groups: list[PackedGroup | GpuGroup] = [*packed_groups(bundle), *gpu_groups(bundle)]
    weights = [group.as_dict() for group in groups]
    document = {"kind": "bundle", "path": str(bundle.path), "bytes": bundle.size, **manifest, "problems": problems}
    if bundle.manifest.target == "tensorrt":
        from edgelm.runtimes.tensorrt.engine_info import engine_document, engines

        document["engines"] = [engine_document(info, bundle) for info in engines(bundle)]
        document["kernels"] = kernels_document(bundle)
    return {**document, "weights": weights} if weights else document


@dataclass(frozen=True)
class PackedGroup:
    """Packed matrices of one kind and shape in all layers and experts: their `count`, and `bytes` of all together."""

    name: str
    matrix: PackedMatrix
    count: int
    bytes: int

    def line(self) -> str:
        """Format the group for people."""
        times = f"{self.count} x " if self.count > 1 else ""
        return f"{self.name}: {times}{self.matrix.describe()}, {self.matrix.bits_per_weight:.2f} bits per weight"

    def as_dict(self) -> dict[str, Any]:
        """Return the group for a JSON document."""
        matrix = self.matrix
        return {
            "name": self.name,
            "count": self.count,
            "kind": matrix.kind.label,
            "group": matrix.group,
            "zeros": matrix.zeros,
            "swiglu": matrix.swiglu,
            "rows": matrix.rows,
            "columns": matrix.columns,
            "bits_per_weight": matrix.bits_per_weight,
            "bytes": self.bytes,
        }


def packed_groups(bundle: Bundle) -> list[PackedGroup]:
    """Read the headers of a native bundle's packed matrices, grouped; empty for other bundles.

    Raises:
        BundleError: a header is damaged.
    """
    import dataclasses
    import re

    from edgelm.bundle.cpu_layout import read_matrices

    manifest = bundle.manifest
    if manifest.ops != "native":
        return []
    found: dict[tuple[str, PackedMatrix], list[int]] = {}
    with bundle.file(manifest.graph.weights_file).open("rb") as stream:
        for tensor in manifest.tensors:
            for _, matrix in read_matrices(stream, tensor.offset, tensor.name):
                key = (re.sub(r"layers\.\d+\.", "layers.*.", tensor.name), dataclasses.replace(matrix, low_offset=0))
                found.setdefault(key, []).append(matrix.first_bytes + matrix.low_bytes)
    return [PackedGroup(name, matrix, len(sizes), sum(sizes)) for (name, matrix), sizes in found.items()]


def calibration_line(info: CalibrationInfo | None) -> str:
    """The calibration text, and the experts that saw too little of it."""
    if info is None:
        return "no: weights were rounded to nearest, or the checkpoint was quantised already"
    methods = ", ".join(f"{count} {method}" for method, count in info.methods.items())
    line = f"{info.samples} x {info.length} tokens of {info.text} (SHA-256 {info.sha256[:12]}); matrices: {methods}"
    if info.smoothing:
        line += f"; smoothed for {info.smoothing}"
    if info.fallbacks:
        named = ", ".join(f"{f.layer}.{f.expert} ({f.tokens})" for f in info.fallbacks)
        line += f"; layer.expert (tokens) that saw too few and were rounded to nearest: {named}"
    return line


def activations_line(manifest: Manifest) -> str:
    """Data type of the activations in matmuls: the recipe's, or what the target has in place of it."""
    from edgelm.errors import RecipeError
    from edgelm.quant.recipe import AUTO, FLOAT, Recipe

    try:
        recipe = Recipe.from_toml(manifest.recipe.toml)
    except RecipeError as error:
        return f"unknown: {error}"  # a recipe of another version: go on with the other rows
    if recipe.default is None and all(rule.scheme is None for rule in recipe.rules):
        return "float32"
    blocks = "int8 in blocks of 32" if manifest.ops == "native" else "int8 in blocks of the weights' groups"

    def words(asked: str) -> str:
        if asked == AUTO:
            return f"{blocks} where weights are integers, else float32"
        if asked == FLOAT:
            return "float32"
        return f"{blocks}, finer than {asked}" if asked.startswith("int8") else f"float32, in place of {asked}"

    own = [rule for rule in recipe.rules if rule.activations not in (None, recipe.activations)]
    return "; ".join([words(recipe.activations), *(f"{rule.pattern}: {words(str(rule.activations))}" for rule in own)])


def bundle_rows(bundle: Bundle, problems: list[str] | None, *, verbose: bool = False) -> list[tuple[str, str]]:
    """Describe a bundle for people, with `verbose` down to files and matrices; `problems` as `Bundle.verify` says."""
    from edgelm.bundle.kv_cache import row_bytes
    from edgelm.cli.inspect.gpu import gpu_groups, kernels_rows, multiplied
    from edgelm.cli.inspect.schemes import schemes_line
    from edgelm.sizes import format_size

    manifest, model = bundle.manifest, bundle.manifest.model
    kv = manifest.graph.kv_dtype
    cached = 2 * model.num_layers * model.num_kv_heads * row_bytes(kv, model.head_dim, manifest.ops)
    weights: list[PackedGroup | GpuGroup] = [*packed_groups(bundle), *gpu_groups(bundle)]
    made = f", made {manifest.created}" if manifest.created else ""
    schemes = schemes_line(bundle)
    rows = [
        ("bundle", f"{bundle.path}, {format_size(bundle.size)}{made}"),
        ("model", f"{model.name} ({model.family}): {_shape(bundle)}"),
        ("recipe", f"{manifest.recipe.name}, floats as {manifest.dtype}"),
        *([] if schemes is None else [("schemes", schemes)]),
        ("calibrated", calibration_line(manifest.calibration)),
        ("activations", multiplied(bundle) if manifest.ops == "gpu" else activations_line(manifest)),
        ("size", _sizes(bundle)),
        ("context", f"{model.context_length:,} tokens, {format_size(cached)} of {kv} cache each"),
        ("runs with", f"{', '.join(_runtimes(bundle)) or 'no runtime here'}, {manifest.ops} operators"),
        *(("needs", f"{need.package} {need.version} or newer: {need.feature}") for need in manifest.requires),
        *engine_rows(bundle),
        ("source", manifest.source.id),
    ]
    if verbose:
        heads = f"{model.num_heads} heads of {model.head_dim}, {model.num_kv_heads} for keys and values"
        rows += [
            ("format", str(manifest.format_version)),
            ("target", manifest.target),
            ("attention", heads),
            ("embedding", "tied to the head" if model.tied else "apart from the head"),
            ("tools", ", ".join(f"{name} {version}" for name, version in manifest.tools.items())),
            *(("file", f"{format_size(info.size):>8}  {info.sha256}  {name}") for name, info in manifest.files.items()),
            *(("weights", f"{format_size(group.bytes):>8}  {group.line()}") for group in weights),
        ]
    rows += kernels_rows(bundle)
    if problems is None:
        rows.append(("verified", "sizes of the files; --verify checks every byte"))
    elif problems:
        rows += [("DAMAGED", problem) for problem in problems]
    else:
        rows.append(("verified", "every file is what was exported"))
    return rows


def _shape(bundle: Bundle) -> str:
    """Return the model's size in a few words."""
    model = bundle.manifest.model
    experts = f", {model.num_experts} experts of which {model.experts_per_token} act" if model.num_experts else ""
    return f"{model.num_layers} layers of {model.hidden_size}{experts}, vocabulary of {model.vocab_size:,}"


def _sizes(bundle: Bundle) -> str:
    """Return the bytes of weights, parity pack and other files."""
    from edgelm.sizes import format_size

    files = bundle.manifest.files
    weights = files[bundle.manifest.graph.weights_file].size
    pack = sum(info.size for name, info in files.items() if name.startswith("parity/"))
    parts = [(weights, "weights"), (pack, "parity pack"), (bundle.size - weights - pack, "other files")]
    return ", ".join(f"{name} {format_size(size)}" for size, name in parts)


def _runtimes(bundle: Bundle) -> list[str]:
    """Return the names of the runtimes that run such a bundle, installed or not."""
    from edgelm.runtimes import runtimes

    manifest = bundle.manifest
    return [
        entry.name
        for entry in runtimes()
        if manifest.target in entry.targets and manifest.ops in entry.classes and not entry.only_by_name
    ]


def engine_rows(bundle: Bundle) -> list[tuple[str, str]]:
    """Return rows about the TensorRT engines of a bundle, and what each needs."""
    if bundle.manifest.target != "tensorrt":
        return []
    from edgelm.runtimes.tensorrt.engine_info import engine_lines, engines

    found = engines(bundle)
    if not found:
        return [("engines", f"none: `edgelm build {bundle.path}` adds one; the runtime cuda-kernels needs none")]
    return [
        (label, line)
        for info in found
        for label, line in zip(("engine", "", ""), engine_lines(info, bundle), strict=True)
    ]
