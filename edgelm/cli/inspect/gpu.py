"""Describe a bundle for GPUs: its weights, its kernels, and the activations of its matmuls."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgelm.bundle import Bundle
    from edgelm.bundle.gpu_layout import GpuMatrix


@dataclass(frozen=True)
class GpuGroup:
    """Blobs of one kind and shape, of all layers: `count` of them, of `bytes` together."""

    name: str
    matrix: GpuMatrix
    count: int
    bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Bits stored for each weight, with scales, zero points and padding."""
        matrix = self.matrix
        return 8 * matrix.nbytes / (matrix.count * matrix.rows * matrix.columns)

    def line(self) -> str:
        """Format the group for people."""
        matrix = self.matrix
        times = f"{self.count} x " if self.count > 1 else ""
        experts = f"{matrix.count} of " if matrix.count > 1 else ""
        shared = ", a scale per row" if matrix.groups == 1 else f"-g{matrix.group}"
        scales = shared if matrix.kind.scale_bytes else ""
        zeros = " with zero points" if matrix.zeros else ""
        gated = ", gate and up" if matrix.swiglu else ""
        return (
            f"{self.name}: {times}{experts}{matrix.rows} x {matrix.columns} {matrix.kind}{scales}{zeros}{gated}, "
            f"{self.bits_per_weight:.2f} bits per weight"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the group for a JSON document."""
        matrix = self.matrix
        return {
            "name": self.name,
            "count": self.count,
            "kind": str(matrix.kind),
            "group": matrix.group,
            "zeros": matrix.zeros,
            "swiglu": matrix.swiglu,
            "matrices": matrix.count,
            "rows": matrix.rows,
            "columns": matrix.columns,
            "bits_per_weight": self.bits_per_weight,
            "bytes": self.bytes,
        }


def gpu_groups(bundle: Bundle) -> list[GpuGroup]:
    """Return the weight blobs of a bundle for GPUs, grouped; empty for other bundles.

    Raises:
        BundleError: its program is damaged.
    """
    if bundle.manifest.ops != "gpu":
        return []
    from edgelm.runtimes.cuda.program import PROGRAM_FILE, Program, matrix_of
    from edgelm.runtimes.cuda.weights import check_weights_file

    program = Program.read(bundle.file(PROGRAM_FILE))
    check_weights_file(program, bundle.file(bundle.manifest.graph.weights_file))
    blobs: dict[str, GpuMatrix] = {}
    for node in program.nodes:
        if node.op in ("QuantEmbedding", "QuantLinear"):
            blobs[node.inputs[1]] = matrix_of(node)
        elif node.op == "SparseMoE":
            blobs |= {node.inputs[2]: matrix_of(node, "gate_up_"), node.inputs[3]: matrix_of(node, "down_")}
    found: dict[tuple[str, GpuMatrix], int] = {}
    for name, matrix in blobs.items():
        key = (re.sub(r"layers\.\d+\.", "layers.*.", name), matrix)
        found[key] = found.get(key, 0) + 1
    return [GpuGroup(name, matrix, count, count * matrix.nbytes) for (name, matrix), count in found.items()]


def kernels_document(bundle: Bundle) -> dict[str, Any] | None:
    """Return which devices a bundle has kernels for, and what compiled them; None for other bundles.

    Raises:
        BundleError: the list of kernels is missing or damaged.
    """
    if bundle.manifest.ops != "gpu":
        return None
    from edgelm.runtimes.cuda.kernels.images import FOLDER, KernelFolder

    folder = KernelFolder(bundle.file(FOLDER))
    return {
        "nvrtc": {target: "{}.{}".format(*version) for target, version in folder.compilers.items()},
        "kernels": len(folder.argument_bytes),
        "targets": {target: bundle.file(f"{FOLDER}/{file}").stat().st_size for target, file in folder.files.items()},
    }


def kernels_rows(bundle: Bundle) -> list[tuple[str, str]]:
    """Return the same as rows for people."""
    from edgelm.sizes import format_size

    document = kernels_document(bundle)
    if document is None:
        return []
    # By compiler and by the driver that an image needs: cubins the compiler's major version, PTX its own.
    groups: dict[tuple[str, str], list[str]] = {}
    for target, nbytes in document["targets"].items():
        version = document["nvrtc"][target]
        needs = version.split(".")[0] if target.startswith("sm_") else version
        groups.setdefault((version, needs), []).append(f"{target} ({format_size(nbytes)})")
    images = "; ".join(
        f"by NVRTC {version}, for drivers of CUDA {needs} or newer: {', '.join(targets)}"
        for (version, needs), targets in groups.items()
    )
    return [("kernels", f"{document['kernels']}, {images}")]


def multiplied(bundle: Bundle) -> str:
    """Return the data type of the activations of a GPU bundle's matmuls."""
    from edgelm.runtimes.cuda.program import PROGRAM_FILE, Program

    program = Program.read(bundle.file(PROGRAM_FILE))
    matmuls = [node for node in program.nodes if "activations" in node.attrs]
    rounded = sum(node.text("activations") != "float" for node in matmuls)
    floats = bundle.manifest.dtype
    if not rounded:
        return floats
    if rounded == len(matmuls):
        return "FP8 E4M3 with a scale for each token"
    return f"FP8 E4M3 with a scale for each token in {rounded} of {len(matmuls)} matmuls, else {bundle.manifest.dtype}"
