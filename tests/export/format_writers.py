"""Write checkpoints in the formats of other tools, bit by bit from the published descriptions, with their true values.

This shares no code with the readers. Fields are written one bit of one code at a time, and the values are computed from
the drawn numbers, not from the stored ones.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgelm.checkpoint import Checkpoint, TensorSpec, float32_to_bf16, write_sharded

Array = NDArray[Any]
Parts = dict[str, tuple[str, Array]]
"""Stored parts of one matrix: the safetensors type and the values by the part's name."""


@dataclass
class Drawn:
    """One matrix: what is stored of it, and the float32 values [N, K] that it stands for."""

    parts: Parts
    values: NDArray[np.float32]
    scheme: str


@dataclass
class Style:
    """A format with its settings: how to draw matrices, and the `quantization_config`."""

    name: str
    config: dict[str, Any]
    draw: Callable[[np.random.Generator, int, int], Drawn]
    recipe: str
    exact_in_portable: bool = True
    input_scale: bool = False
    extras: dict[str, Any] = field(default_factory=dict)


def stream(fields: Array, bits: int) -> Array:
    """Pack fields [count, X] from the lowest bit up into words, int32 [count * bits / 32, X]."""
    words = np.zeros((len(fields) * bits // 32, fields.shape[1]), np.uint64)
    for index in range(len(fields)):
        for bit in range(bits):
            place = index * bits + bit
            one = (fields[index].astype(np.uint64) >> np.uint64(bit)) & np.uint64(1)
            words[place // 32] |= one << np.uint64(place % 32)
    return words.astype(np.uint32).view(np.int32)


def dequantized(codes: Array, zeros: Array, scales: Array, group: int) -> NDArray[np.float32]:
    """Return (code - zero) * scale, column by column, in float32."""
    values = np.empty(codes.shape, np.float32)
    for k in range(codes.shape[1]):
        distance = codes[:, k].astype(np.int64) - zeros[:, k // group].astype(np.int64)
        values[:, k] = distance.astype(np.float32) * scales[:, k // group].astype(np.float32)
    return values


def numbers(
    rng: np.random.Generator, rows: int, columns: int, bits: int, group: int | None, symmetric: bool
) -> tuple[Array, Array, Array, int]:
    """Draw codes [N, K], zero points [N, G] and float16 scales [N, G]; return them with the values per group."""
    width = columns if group is None else group
    groups = -(-columns // width)
    codes = rng.integers(0, 1 << bits, (rows, columns))
    zeros = np.full((rows, groups), 1 << (bits - 1))
    if not symmetric:
        zeros = rng.integers(1, (1 << bits), (rows, groups))
    scales = (rng.uniform(0.02, 0.2, (rows, groups)) / (1 << bits)).astype(np.float16)
    return codes, zeros, scales, width


def scheme_name(bits: int, group: int | None, columns: int, symmetric: bool) -> str:
    """Return EdgeLM's name of a scheme; a group that does not divide the row is reduced to a power of two that does."""
    if group is not None:
        while columns % group:
            group //= 2
    size = "row" if group is None else f"g{group}"
    return f"int{bits}-{size}-{'sym' if symmetric else 'asym'}"


def gptq(
    bits: int = 4, group: int | None = 32, symmetric: bool = True, version: int = 1, index: bool = True
) -> Callable[[np.random.Generator, int, int], Drawn]:
    """Write AutoGPTQ's layout: codes along K, zero points along N, decremented in version 1."""

    def draw(rng: np.random.Generator, rows: int, columns: int) -> Drawn:
        codes, zeros, scales, width = numbers(rng, rows, columns, bits, group, symmetric)
        parts: Parts = {
            "qweight": ("I32", stream(codes.T, bits)),
            "qzeros": ("I32", stream(zeros - (1 if version == 1 else 0), bits).T),
            "scales": ("F16", scales.T),
        }
        if index:
            parts["g_idx"] = ("I32", np.array([k // width for k in range(columns)], np.int32))
        return Drawn(parts, dequantized(codes, zeros, scales, width), scheme_name(bits, group, columns, symmetric))

    return draw


def awq(group: int | None = 32) -> Callable[[np.random.Generator, int, int], Drawn]:
    """Write AutoAWQ's gemm layout: eight outputs per word, the even ones first."""

    def interleaved(fields: Array) -> Array:
        words = np.zeros((len(fields), fields.shape[1] // 8), np.uint64)
        for word in range(words.shape[1]):
            for nibble, output in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                words[:, word] |= fields[:, 8 * word + output].astype(np.uint64) << np.uint64(4 * nibble)
        return words.astype(np.uint32).view(np.int32)

    def draw(rng: np.random.Generator, rows: int, columns: int) -> Drawn:
        codes, zeros, scales, width = numbers(rng, rows, columns, 4, group, False)
        zeros[0, 0] = 0
        parts: Parts = {
            "qweight": ("I32", interleaved(codes.T)),
            "qzeros": ("I32", interleaved(zeros.T)),
            "scales": ("F16", scales.T),
        }
        return Drawn(parts, dequantized(codes, zeros, scales, width), scheme_name(4, group, columns, False))

    return draw


def packed(
    bits: int = 4, group: int | None = 32, symmetric: bool = True, zero_type: str = "I32", scale_type: str = "BF16"
) -> Callable[[np.random.Generator, int, int], Drawn]:
    """Write compressed-tensors' pack-quantized: signed codes plus half their range, along K; zero points along N."""

    def draw(rng: np.random.Generator, rows: int, columns: int) -> Drawn:
        codes, zeros, scales, width = numbers(rng, rows, columns, bits, group, symmetric)
        half = 1 << (bits - 1)
        stored, exact = scales_as(scales, scale_type)
        parts: Parts = {
            "weight_packed": ("I32", stream(codes.T, bits).T),
            "weight_scale": (scale_type, stored),
            "weight_shape": ("I64", np.array([rows, columns])),
        }
        if not symmetric:
            as_bytes = (zeros - half).astype(np.int8)
            parts["weight_zero_point"] = ("I32", stream(zeros, bits)) if zero_type == "I32" else ("I8", as_bytes)
        return Drawn(parts, dequantized(codes, zeros, exact, width), scheme_name(bits, group, columns, symmetric))

    return draw


def int8(
    per: str = "channel", symmetric: bool = True, input_scale: bool = False
) -> Callable[[np.random.Generator, int, int], Drawn]:
    """Write compressed-tensors' int-quantized: signed bytes, one scale per row or per matrix."""

    def draw(rng: np.random.Generator, rows: int, columns: int) -> Drawn:
        codes, zeros, scales, width = numbers(rng, rows, columns, 8, None, symmetric)
        if per == "tensor":
            scales, zeros = np.repeat(scales[:1], rows, axis=0), np.repeat(zeros[:1], rows, axis=0)
        stored, exact = scales_as(scales, "BF16")
        signed = (zeros - 128).astype(np.int8)
        parts: Parts = {
            "weight": ("I8", (codes - 128).astype(np.int8)),
            "weight_scale": ("BF16", stored[0] if per == "tensor" else stored),
        }
        if not symmetric:
            parts["weight_zero_point"] = ("I8", signed[0] if per == "tensor" else signed)
        if input_scale:
            parts["input_scale"] = ("F32", np.array([0.03125], np.float32))
        return Drawn(parts, dequantized(codes, zeros, exact, width), scheme_name(8, None, columns, symmetric))

    return draw


def fp8(
    scale: str = "weight_scale", per: str = "tensor", scale_type: str = "F32", input_scale: bool = False
) -> Callable[[np.random.Generator, int, int], Drawn]:
    """Write FP8 codes with scales per matrix, per row, per group of 32, or per block of 128 x 128."""

    def draw(rng: np.random.Generator, rows: int, columns: int) -> Drawn:
        codes = rng.integers(0, 256, (rows, columns)).astype(np.uint8)
        codes[codes & 0x7F == 0x7F] = 0
        numbers = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy()
        height, width = {"tensor": (rows, columns), "row": (1, columns), "group": (1, 32), "block": (128, 128)}[per]
        shape = (-(-rows // height), -(-columns // width))
        stored, exact = scales_as(rng.uniform(1e-4, 5e-4, shape).astype(np.float32), scale_type)
        values = np.empty((rows, columns), np.float32)
        for n in range(rows):
            for k in range(columns):
                values[n, k] = numbers[n, k] * exact[n // height, k // width]
        parts: Parts = {
            "weight": ("F8_E4M3", codes),
            scale: (scale_type, stored.reshape(()) if per == "tensor" else stored),
        }
        if input_scale:
            parts["input_scale"] = ("F32", np.array(0.0625, np.float32))
        size = {"tensor": "row", "row": "row", "group": "b32", "block": f"b{min(128, columns)}"}[per]
        return Drawn(parts, values, f"fp8-{size}")

    return draw


def scales_as(scales: Array, dtype: str) -> tuple[Array, NDArray[np.float32]]:
    """Return scales stored in a type, and their float32 values then."""
    wide = scales.astype(np.float32)
    if dtype == "BF16":
        bits = float32_to_bf16(wide)
        return bits, (bits.astype(np.uint32) << 16).view(np.float32)
    stored = wide.astype({"F16": np.float16, "F32": np.float32}[dtype])
    return stored, stored.astype(np.float32)


def group_of(**changes: Any) -> dict[str, Any]:
    """One entry of compressed-tensors' config_groups."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    return {"targets": ["Linear"], "weights": {**weights, **changes}, "input_activations": None}


def compressed(form: str, *groups: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A quantization_config of compressed-tensors."""
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        "ignore": ["lm_head", "re:.*mlp[.]gate$"],
        "kv_cache_scheme": None,
        **changes,
    }


def gptq_config(**changes: Any) -> dict[str, Any]:
    """A quantization_config of AutoGPTQ."""
    return {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False, **changes}


STYLES = [
    Style("gptq", gptq_config(), gptq(), "gptq-int4-g32"),
    Style(
        "gptq-asym", gptq_config(sym=False, group_size=64), gptq(4, 64, False), "gptq-int4-g64-asym",
    ),
    Style(
        "gptq-v2", gptq_config(sym=False, checkpoint_format="gptq_v2", group_size=128),
        gptq(4, 128, False, version=2, index=False), "gptq-int4-g128-asym",
    ),
    Style("gptq-row", gptq_config(group_size=-1, desc_act=True), gptq(4, None), "gptq-int4-row"),
    Style("gptq-int8", gptq_config(bits=8), gptq(8, 32), "gptq-int8-g32"),
    Style("gptq-int3", gptq_config(bits=3, sym=False), gptq(3, 32, False), "gptq-int3-g32-asym", False),
    Style(
        "awq", {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "GEMM"}, awq(),
        "awq-int4-g32-asym",
    ),
    Style("packed", compressed("pack-quantized", group_of()), packed(), "compressed-tensors-int4-g32"),
    Style(
        "packed-asym", compressed("pack-quantized", group_of(symmetric=False)), packed(4, 32, False),
        "compressed-tensors-int4-g32-asym",
    ),
    Style(
        "packed-asym-bytes", compressed("pack-quantized", group_of(symmetric=False)),
        packed(4, 32, False, zero_type="I8"), "compressed-tensors-int4-g32-asym",
    ),
    Style(
        "packed-int8", compressed("pack-quantized", group_of(num_bits=8, strategy="channel", group_size=None)),
        packed(8, None, scale_type="F16"), "compressed-tensors-int8-row",
    ),
    Style(
        "int8", compressed("int-quantized", group_of(num_bits=8, strategy="channel", group_size=None)), int8(),
        "compressed-tensors-int8-row",
    ),
    Style(
        "int8-asym",
        compressed("int-quantized", group_of(num_bits=8, strategy="channel", group_size=None, symmetric=False)),
        int8(symmetric=False), "compressed-tensors-int8-row-asym",
    ),
    Style(
        "int8-static",
        compressed(
            "int-quantized",
            {
                **group_of(num_bits=8, strategy="tensor", group_size=None),
                "input_activations": {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False},
            },
        ),
        int8("tensor", input_scale=True), "compressed-tensors-int8-row", input_scale=True,
    ),
    Style(
        "int8-token",
        compressed(
            "int-quantized",
            {
                **group_of(num_bits=8, strategy="channel", group_size=None),
                "input_activations": {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True},
            },
        ),
        int8(), "compressed-tensors-int8-row",
    ),
    Style(
        "float8",
        compressed("float-quantized", group_of(num_bits=8, type="float", strategy="channel", group_size=None)),
        fp8(per="row", scale_type="BF16"), "compressed-tensors-fp8-row", False,
    ),
    Style(
        "naive-float8", compressed("naive-quantized", group_of(num_bits=8, type="float")), fp8(per="group"),
        "compressed-tensors-fp8-b32", False,
    ),
    Style(
        "block-float8",
        compressed(
            "float-quantized",
            group_of(num_bits=8, type="float", strategy="block", group_size=None, block_structure=[128, 128]),
        ),
        fp8(per="block"), "compressed-tensors-fp8-b128", False,
    ),
    Style(
        "fp8-block", {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
        fp8("weight_scale_inv", "block"), "fp8-b128-stored", False,
    ),
    Style(
        "fp8-static", {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
        fp8(input_scale=True), "fp8-row-stored", False, input_scale=True,
    ),
]  # fmt: skip
"""One of everything that is read."""


def linear(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether other tools quantise a tensor: linear layers, but not routers, embedding and head."""
    return len(shape) == 2 and not name.endswith((".mlp.gate.weight", "embed_tokens.weight", "lm_head.weight"))


@dataclass
class Written:
    """A written checkpoint: the true values of each tensor, and the schemes of the quantised ones."""

    path: Path
    values: dict[str, NDArray[np.float32]]
    schemes: dict[str, str]
    arrays: Parts
    """Everything stored, by its whole key."""

    def change(self, key: str, array: Array | None, dtype: str | None = None) -> None:
        """Replace, add or drop one stored tensor."""
        if array is None:
            del self.arrays[key]
        else:
            self.arrays[key] = (dtype or self.arrays[key][0], array)
        self.store()

    def configure(self, change: Mapping[str, Any]) -> None:
        """Change fields of quantization_config."""
        path = self.path / "config.json"
        config = json.loads(path.read_text())
        config["quantization_config"] = {**config["quantization_config"], **change}
        path.write_text(json.dumps(config))

    def store(self) -> None:
        """Write the weights."""
        for old in self.path.glob("*.safetensors"):
            old.unlink()
        specs = {key: TensorSpec(dtype, array.shape) for key, (dtype, array) in self.arrays.items()}
        write_sharded(self.path, specs, lambda key: [np.asarray(self.arrays[key][1], order="C")])


def write_format(
    float_folder: Path,
    out: Path,
    style: Style,
    quantise: Callable[[str, tuple[int, ...]], bool] = linear,
    draw_for: Callable[[str], Callable[[np.random.Generator, int, int], Drawn] | None] = lambda name: None,
) -> Written:
    """Write a copy of the checkpoint `float_folder` whose linear layers have the format `style`."""
    out.mkdir()
    for path in float_folder.iterdir():
        if path.suffix != ".safetensors":
            shutil.copyfile(path, out / path.name)
    config = json.loads((float_folder / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "quantization_config": style.config}))
    rng = np.random.default_rng(11)
    written = Written(out, {}, {}, {})
    with Checkpoint.open(float_folder) as checkpoint:
        for name, info in checkpoint.tensors.items():
            if not quantise(name, info.shape):
                written.values[name] = checkpoint.read_float32(name)
                written.arrays[name] = (info.dtype, checkpoint.read_raw(name))
                continue
            drawn = (draw_for(name) or style.draw)(rng, *info.shape)
            written.values[name], written.schemes[name] = drawn.values, drawn.scheme
            for part, stored in drawn.parts.items():
                written.arrays[f"{name.removesuffix('.weight')}.{part}"] = stored
    written.store()
    return written
