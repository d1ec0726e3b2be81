"""Damage a bundle in various ways, and update its manifest, so that only the arithmetic can detect the damage."""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path

import numpy as np
import onnx
from onnx import helper

from edgelm.bundle.cpu_layout import HEADER_BYTES, TILE, read_matrices

GRAPHS = ("model.onnx", "model.debug.onnx")


def manifest(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def reseal(folder: Path) -> None:
    """Update sizes, hashes and checksums in the manifest to those of the files."""
    data = manifest(folder)
    for name, info in data["files"].items():
        content = (folder / name).read_bytes()
        info.update(size=len(content), sha256=hashlib.sha256(content).hexdigest())
    weights = (folder / data["graph"]["weights_file"]).read_bytes()
    for tensor in data["tensors"]:
        tensor["crc32"] = zlib.crc32(weights[tensor["offset"] : tensor["offset"] + tensor["size"]])
    (folder / "manifest.json").write_text(json.dumps(data))


class Tensor:
    """A tensor of the weights file as a writable array, which is stored at the end of the block."""

    def __init__(self, folder: Path, name: str, dtype, shape=(-1,)) -> None:
        data = manifest(folder)
        self._entry = next(entry for entry in data["tensors"] if entry["name"] == name)
        self._path = folder / data["graph"]["weights_file"]
        self._dtype, self._shape = dtype, shape

    def __enter__(self) -> np.ndarray:
        with self._path.open("rb") as file:
            file.seek(self._entry["offset"])
            self.array = np.frombuffer(file.read(self._entry["size"]), self._dtype).reshape(self._shape).copy()
        return self.array

    def __exit__(self, *_: object) -> None:
        with self._path.open("r+b") as file:
            file.seek(self._entry["offset"])
            file.write(self.array.tobytes())


def tensor_names(folder: Path) -> list[str]:
    return [entry["name"] for entry in manifest(folder)["tensors"]]


def edit_graphs(folder: Path, change, graphs=GRAPHS) -> None:
    """Apply `change(graph)` to the graphs and store them; it returns the number of nodes it changed, at least one."""
    for name in graphs:
        model = onnx.load(folder / name, load_external_data=False)
        assert change(model.graph), f"there is nothing to damage in {name}"
        (folder / name).write_bytes(model.SerializeToString())


def find(graph, op: str, output: str):
    return next(node for node in graph.node if node.op_type == op and output in node.output)


def is_native(folder: Path) -> bool:
    return manifest(folder)["ops"] == "native"


def renormalise_routing(folder: Path, layer: int, graphs=GRAPHS) -> None:
    """Renormalise the weights of the selected experts.

    Native: set the operator's attribute. Portable: remove input 14 of QMoE, so that the kernel applies the softmax to
    the selected experts only.
    """

    def change(graph) -> int:
        if is_native(folder):
            node = next(n for n in graph.node if label(n) == f"layers.{layer}.moe")
        else:
            node = next(n for n in graph.node if n.op_type in ("QMoE", "MoE") and n.output[0] == f"layers.{layer}.moe")
        if node.op_type == "QMoE":
            assert len(node.input) == 15
            del node.input[14:]
        else:
            names = ("normalize", "normalize_routing_weights")
            next(a for a in node.attribute if a.name in names).i = 1
        return 1

    edit_graphs(folder, change, graphs)


def label(node) -> str:
    return next((a.s.decode() for a in node.attribute if a.name == "name"), "")


class Packed:
    """The records of a packed matrix as a writable array [tiles, records, bytes], stored at the end of the block.

    `index` counts the matrices of a tensor: in an MoE gate+up of the first expert, its down, and so on.
    """

    def __init__(self, folder: Path, tensor: str, index: int = 0) -> None:
        data = manifest(folder)
        entry = next(entry for entry in data["tensors"] if entry["name"] == tensor)
        self._path = folder / data["graph"]["weights_file"]
        with self._path.open("rb") as file:
            place, self.matrix = read_matrices(file, entry["offset"], tensor)[index]
            self.first = place + HEADER_BYTES
            self._offset = entry["offset"] + self.first
            file.seek(self._offset)
            shape = (self.matrix.tiles, self.matrix.records, self.matrix.record_bytes)
            self.records = np.frombuffer(file.read(int(np.prod(shape))), np.uint8).reshape(shape).copy()

    def __enter__(self) -> Packed:
        return self

    def __exit__(self, *_: object) -> None:
        with self._path.open("r+b") as file:
            file.seek(self._offset)
            file.write(self.records.tobytes())

    @property
    def scales(self) -> np.ndarray:
        """Scales as a view, float16 [tiles, records, 32]."""
        return self.records[:, :, :64].view(np.float16)

    def middle_code(self) -> int:
        """Return the offset in the tensor of a code in the middle of the matrix."""
        matrix = self.matrix
        return self.first + matrix.tiles // 2 * matrix.records * matrix.record_bytes + matrix.record_bytes // 2


def expert_parts(folder: Path, layer: int, matrix: str):
    """Yield (tensor name, bytes of one element) of the stacked experts' tensors of a layer."""
    stem = f"layers.{layer}.moe.{matrix}"
    return [name for name in tensor_names(folder) if name == stem or name.startswith(f"{stem}.")]


def swap_gate_and_up(folder: Path, layer: int) -> None:
    """Swap gate and up. Native: alternating tiles. Portable: alternating rows of an MoE, else one after the other."""
    experts = manifest(folder)["model"]["num_experts"]
    if is_native(folder):
        tensor = f"layers.{layer}.moe.experts" if experts else f"layers.{layer}.mlp.gate_up.weight"
        for expert in range(max(experts, 1)):
            with Packed(folder, tensor, 2 * expert) as packed:
                assert packed.matrix.swiglu
                packed.records[:] = packed.records.reshape(-1, 2, *packed.records.shape[1:])[:, ::-1].reshape(
                    packed.records.shape
                )
        return
    names = [
        n for n in tensor_names(folder) if n.startswith((f"layers.{layer}.moe.gate_up", f"layers.{layer}.mlp.gate_up"))
    ]
    assert names
    for name in names:
        rows = fused_rows(folder) * max(experts, 1)
        with Tensor(folder, name, np.uint8, (rows, -1)) as array:
            if experts:
                array[:] = array.reshape(-1, 2, array.shape[1])[:, ::-1].reshape(array.shape)
            else:
                array[:] = np.concatenate([array[rows // 2 :], array[: rows // 2]])


def fused_rows(folder: Path) -> int:
    return 2 * json.loads((folder / "config.json").read_text())["intermediate_size"]


def corrupt_expert_scales(folder: Path, layer: int, expert: int, factor: float = 1.25) -> None:
    if is_native(folder):
        with Packed(folder, f"layers.{layer}.moe.experts", 2 * expert) as packed:
            packed.scales[:] = packed.scales * np.float16(factor)
        return
    experts = manifest(folder)["model"]["num_experts"]
    with Tensor(folder, f"layers.{layer}.moe.gate_up.scales", np.float32, (experts, -1)) as scales:
        scales[expert] *= factor


def exchange_experts(folder: Path, layer: int, first: int, second: int) -> None:
    experts = manifest(folder)["model"]["num_experts"]
    if is_native(folder):
        with Tensor(folder, f"layers.{layer}.moe.experts", np.uint8) as array:
            table = array[HEADER_BYTES : HEADER_BYTES + 16 * experts].reshape(experts, 16)
            table[[first, second]] = table[[second, first]]
        return
    for matrix in ("gate_up", "down"):
        for name in expert_parts(folder, layer, matrix):
            with Tensor(folder, name, np.uint8, (experts, -1)) as array:
                array[[first, second]] = array[[second, first]]


def damage_embedding_row(folder: Path, token: int, factor: float = 1.5) -> None:
    if is_native(folder):
        with Packed(folder, "model.embed_tokens.weight") as packed:
            packed.scales[token // TILE, :, token % TILE] *= np.float16(factor)
        return
    rows = manifest(folder)["model"]["vocab_size"]
    with Tensor(folder, "model.embed_tokens.scales", np.float32, (rows, -1)) as scales:
        scales[token] *= factor


def change_rope_base(folder: Path, theta: float) -> None:
    model = manifest(folder)["model"]
    half = model["head_dim"] // 2
    inverse = theta ** (-np.arange(half, dtype=np.float64) * 2 / model["head_dim"])
    angles = np.outer(np.arange(model["context_length"]), inverse)
    for name, values in (("rope.cos", np.cos(angles)), ("rope.sin", np.sin(angles))):
        with Tensor(folder, name, np.float32, (-1, half)) as array:
            array[:] = values


def norm_queries_per_head(folder: Path, layer: int) -> None:
    """Apply QK-norm to each head instead of the whole projection, with the same weights."""
    model = manifest(folder)["model"]
    heads, width = model["num_heads"], model["head_dim"]
    kv_width = model["num_kv_heads"] * width

    def add_constants(graph) -> None:
        graph.initializer.append(helper.make_tensor("d.split", onnx.TensorProto.INT64, [4], [0, 0, heads, width]))
        graph.initializer.append(helper.make_tensor("d.join", onnx.TensorProto.INT64, [3], [0, 0, heads * width]))
        graph.initializer.append(helper.make_tensor("d.ones", onnx.TensorProto.FLOAT, [width], [1.0] * width))

    def per_head(x: str, eps: float) -> list:
        return [
            helper.make_node("Reshape", [x, "d.split"], ["d.heads"]),
            helper.make_node("SimplifiedLayerNormalization", ["d.heads", "d.ones"], ["d.normed"], axis=-1, epsilon=eps),
            helper.make_node("Reshape", ["d.normed", "d.join"], ["d.joined"]),
        ]

    def portable(graph) -> int:
        name = f"layers.{layer}.attn.q_normed"
        index, node = next((i, n) for i, n in enumerate(graph.node) if name in n.output)
        eps = next(a.f for a in node.attribute if a.name == "epsilon")
        new = [*per_head(node.input[0], eps), helper.make_node("Mul", ["d.joined", node.input[1]], [name])]
        return replace_nodes(graph, index, [*new], 1)

    def native(graph) -> int:
        # The operator's own norm follows. If all heads have a mean square of 1, it only multiplies by the weights.
        index, node = next((i, n) for i, n in enumerate(graph.node) if label(n) == f"layers.{layer}.attn")
        eps = next(a.f for a in node.attribute if a.name == "epsilon")
        sizes = [heads * width, 2 * kv_width]
        graph.initializer.append(helper.make_tensor("d.sizes", onnx.TensorProto.INT64, [2], sizes))
        new = [
            helper.make_node("Split", [node.input[0], "d.sizes"], ["d.q", "d.kv"], axis=-1),
            *per_head("d.q", eps),
            helper.make_node("Concat", ["d.joined", "d.kv"], ["d.qkv"], axis=-1),
        ]
        node.input[0] = "d.qkv"
        return replace_nodes(graph, index, new, 0)

    def change(graph) -> int:
        add_constants(graph)
        return native(graph) if is_native(folder) else portable(graph)

    edit_graphs(folder, change)


def replace_nodes(graph, index: int, new: list, count: int) -> int:
    nodes = [*graph.node[:index], *new, *graph.node[index + count :]]
    del graph.node[:]
    graph.node.extend(nodes)
    return 1


def flip_byte(folder: Path, tensor: str, position: int, mask: int = 0x80) -> None:
    with Tensor(folder, tensor, np.uint8) as array:
        array[position] ^= mask


def exchange_tokens(folder: Path) -> None:
    """Swap the ids of two ordinary tokens."""
    path = folder / "tokenizer.json"
    if path.is_file():
        data = json.loads(path.read_text(encoding="utf-8"))
        vocab = data["model"]["vocab"]
        first, second = [token for token in vocab if token.isalpha() and token.isascii() and len(token) == 1][:2]
        vocab[first], vocab[second] = vocab[second], vocab[first]
        path.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
        return
    path = folder / "tokenizer.model"
    data = path.read_bytes()
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_proto=data)
    pieces = [model.IdToPiece(i) for i in range(model.GetPieceSize())]
    # Swap the texts of two pieces of equal length in place: a valid file of another vocabulary.
    first, second = [piece for piece in pieces if piece.isalpha() and piece.isascii() and len(piece) == 3][-2:]
    mark = "\0" * 3
    for old, new in ((first, mark), (second, first), (mark, second)):
        needle = b"\n\x03" + old.encode()
        assert data.count(needle) == 1, old
        data = data.replace(needle, b"\n\x03" + new.encode())
    path.write_bytes(data)
