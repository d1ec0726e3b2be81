"""How near to this GPU's limits are single kernels, and how fast compared with PyTorch's (cuBLAS, flash attention)?

    python tests/bench/gpu_kernels.py [--repeat 20]

Times matmuls of the published shapes with few rows (bytes of weights, compared with a copy's bandwidth) and with many
(operations, compared with PyTorch's largest matmul), and attention over long caches. Inputs are random. Where bytes are
counted, several matrices are read in turn, which together are larger than the L2 cache. Every matmul's result is
compared with PyTorch's in float32 before it is timed; one that differs is still timed, named again at the end, and
makes the exit code 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_figures
import gpu_random
import numpy as np
import torch
from gpu_figures import Figure

from edgelm.bundle.gpu_layout import GpuKind, GpuMatrix
from edgelm.runtimes.cuda.driver import CudaDevice
from edgelm.runtimes.cuda.kernels.images import KernelCompiler

sys.path.insert(0, str(Path(__file__).parents[1] / "cuda"))
import attention_calls as attention
import linear_calls as linear
from attention_calls import AttentionBuffers, AttentionShape
from linear_calls import Matmul

_SHAPES = {
    "qkv OLMoE": (6144, 2048), "qkv Fox": (3072, 2048), "o": (2048, 2048), "gate, up Fox": (8192, 2048),
    "down Fox": (2048, 4096), "head OLMoE": (50304, 2048), "head Fox": (256000, 2048),
}  # fmt: skip
_CACHE = 192 << 20
"""Bytes; more than the L2 cache of any supported GPU."""


def _unpacked(matrix: GpuMatrix, codes: np.ndarray, scale: float) -> torch.Tensor:
    """Return the float32 matrix [N, K] of a blob whose scales are all `scale`, by the description of the layout."""
    tiles = codes.reshape(
        matrix.blocks, matrix.columns // matrix.kind.columns, 8, 4, 4, 4
    )  # block, tile, g, q, word, byte
    out = np.zeros((matrix.blocks, 16, tiles.shape[1], matrix.kind.columns), np.float32)
    g, q = np.arange(8), np.arange(4)

    for lane in q:
        words = np.ascontiguousarray(tiles[:, :, :, lane]).view(np.uint32)[..., 0]  # block, tile, g, word
        for word in range(4):
            w = words[..., word]
            if matrix.kind is GpuKind.BFLOAT16:
                for half in range(2):
                    values = (w >> np.uint32(16 * half) << np.uint32(16)).view(np.float32)
                    column = 2 * lane + half + 8 * (word // 2)
                    for group in g:
                        out[:, group + 8 * (word % 2), :, column] = values[:, :, group]
            elif matrix.kind is GpuKind.INT4:
                for nibble in range(8):
                    values = ((w >> np.uint32(4 * nibble)) & np.uint32(15)).astype(np.float32) - 8
                    register, second = nibble % 4, nibble // 4
                    column = 16 * word + 2 * lane + second + 8 * (register // 2)
                    for group in g:
                        out[:, group + 8 * (register % 2), :, column] = values[:, :, group]
            else:
                for byte in range(4):
                    code = ((w >> np.uint32(8 * byte)) & np.uint32(255)).astype(np.uint8)
                    if matrix.kind is GpuKind.INT8:
                        values = code.astype(np.float32) - 128
                    else:
                        values = torch.from_numpy(code).view(torch.float8_e4m3fn).float().numpy()
                    column = 16 * (word // 2) + 2 * lane + byte % 2 + 8 * (byte // 2)
                    for group in g:
                        out[:, group + 8 * (word % 2), :, column] = values[:, :, group]
    return torch.from_numpy(out.reshape(matrix.blocks * 16, matrix.columns)[: matrix.rows] * np.float32(scale))


def _matrices(device: CudaDevice, matrix: GpuMatrix, copies: int) -> tuple[list[int], torch.Tensor]:
    """Return the addresses of equal random matrices, and their values."""
    pool = gpu_random._codes(matrix.kind, np.random.default_rng(3))
    codes = np.resize(pool, matrix.codes_stride)
    scale = {GpuKind.BFLOAT16: 1.0, GpuKind.INT8: 0.02 / 74, GpuKind.INT4: 0.02 / 4.6, GpuKind.FP8: 0.04}[matrix.kind]
    scale_type = np.float16 if matrix.kind.scale_bytes == 2 else np.float32
    addresses = []
    for _ in range(copies):
        address = device.allocate(matrix.nbytes)
        device.upload(address, codes)
        if matrix.kind.scale_bytes:
            count = matrix.scales_stride // matrix.kind.scale_bytes
            device.upload(address + matrix.scales_offset, np.full(count, scale, scale_type))
        addresses.append(address)
    return addresses, _unpacked(matrix, codes, float(scale_type(scale)))


def _compare(name: str, found: torch.Tensor, expected: torch.Tensor, wrong: list[str]) -> None:
    error = float((found - expected).norm() / expected.norm())
    if not error < 5e-3:
        wrong.append(f"{name} differs from PyTorch by {error:.2e}")
        print(wrong[-1], flush=True)


def matmuls(
    device: CudaDevice, kind: GpuKind, rows: int, repeat: int, shapes: list[str], wrong: list[str]
) -> list[Figure]:
    """Time y = x w^T for some shapes; x is bf16. Results that differ from PyTorch's are appended to `wrong`."""
    figures = []
    for shape in shapes:
        n, k = _SHAPES[shape]
        group = {GpuKind.INT4: 32, GpuKind.INT8: 32}.get(kind, k)
        matrix = GpuMatrix(kind, n, k, group)
        copies = max(1, min(24, -(-_CACHE // matrix.nbytes))) if rows <= linear.SKINNY_ROWS else 1
        blobs, weights = _matrices(device, matrix, copies)
        x = torch.randn(rows, k, device="cuda").to(torch.bfloat16)
        y = torch.full((rows, n), float("nan"), device="cuda")
        torch.cuda.synchronize()
        launches = []
        scratch = 0
        for blob in blobs:
            matmul = Matmul(matrix, blob, x.data_ptr(), y.data_ptr(), rows, y_float=True)
            need = linear.workspace_bytes(matmul)
            scratch = scratch or (device.allocate(need) if need else 0)
            launches.append(linear.matmul_launches(matmul, device.info, scratch))
        device.load(sorted({launch.kernel for launch in launches[0]}))
        for launch in launches[0]:
            device.launch(launch)
        device.synchronize()
        expected = x.float() @ weights.cuda().T
        _compare(f"{shape} {kind} x {rows}", y, expected, wrong)

        def ours(launches: Any = launches) -> None:
            for one in launches:
                for launch in one:
                    device.launch(launch)

        graph = device.capture(ours)
        dense = [weights.cuda().to(torch.bfloat16) for _ in range(copies)]
        peer = _torch_graph(lambda dense=dense, x=x: [torch.nn.functional.linear(x, w) for w in dense])
        mine, theirs = gpu_figures.paired(
            lambda graph=graph, copies=copies: device.elapsed(graph, 1)[0] / copies,
            lambda peer=peer, copies=copies: peer() / copies,
            repeat,
        )
        nbytes = matrix.nbytes + rows * (2 * k + 4 * n)
        few = rows <= linear.SKINNY_ROWS
        name = f"{shape} {kind} x {rows}"
        figures.append(Figure(name, mine, nbytes if few else 0, 0 if few else 2 * rows * n * k, peer=theirs))
        for address in (*blobs, *([scratch] if scratch else [])):
            device.free(address)
    return figures


def _torch_graph(work: Callable[[], Any]) -> Callable[[], float]:
    """Return a function that runs PyTorch's kernels as a CUDA graph and returns the seconds."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()

    def timed() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    return timed


def decode_attention(device: CudaDevice, heads: int, kv_heads: int, past: int, cache: str, repeat: int) -> Figure:
    """Time attention of one token over a cache, compared with PyTorch's scaled_dot_product_attention (bf16 cache)."""
    capacity = past + 64
    shape = AttentionShape(1, 1, heads, kv_heads, 128, capacity, capacity, "bf16", cache)
    copies = max(1, -(-_CACHE // (2 * shape.cache_bytes())))
    random = np.random.default_rng(4)
    qkv = torch.randn(1, (heads + 2 * kv_heads) * 128, device="cuda").to(torch.bfloat16)
    out = torch.empty(1, heads * 128, device="cuda", dtype=torch.bfloat16)
    caches = []
    for _ in range(copies):
        pair = [device.allocate(shape.cache_bytes()) for _ in range(2)]
        for address in pair:
            # Small positive codes and scales: any bytes below 0x3b are valid in every type.
            device.upload(address, random.integers(0x30, 0x3B, shape.cache_bytes(), np.uint8))
        caches.append(pair)
    lengths, cos = device.allocate(4), device.allocate(capacity * 256)
    device.upload(lengths, np.array([past], np.int32))
    device.upload(cos, np.ones((capacity, 64), np.float32))
    scratch = device.allocate(max(attention.workspace_bytes(shape, device.info.multiprocessors), 256))
    counters = device.allocate(shape.counter_bytes())
    device.fill(counters, 0, shape.counter_bytes())
    torch.cuda.synchronize()
    steps = []
    for key, value in caches:
        buffers = AttentionBuffers(
            qkv.data_ptr(), key, value, lengths, cos, cos, out.data_ptr(), scratch, counters=counters
        )
        steps.append(attention.attention_launches(shape, buffers, device.info.multiprocessors))
    device.load(sorted({launch.kernel for launch in steps[0]}))

    def ours() -> None:
        for step in steps:
            for launch in step:
                device.launch(launch)

    graph = device.capture(ours)
    q = torch.randn(1, heads, 1, 128, device="cuda", dtype=torch.bfloat16)
    kvs = [torch.randn(2, 1, kv_heads, past, 128, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
    peer = _torch_graph(
        lambda: [
            torch.nn.functional.scaled_dot_product_attention(q, kv[0], kv[1], enable_gqa=heads != kv_heads)
            for kv in kvs
        ]
    )
    mine, theirs = gpu_figures.paired(lambda: device.elapsed(graph, 1)[0] / copies, lambda: peer() / copies, repeat)
    for address in (lengths, cos, scratch, counters, *(a for pair in caches for a in pair)):
        device.free(address)
    nbytes = 2 * kv_heads * past * attention.row_bytes(cache, 128)
    return Figure(f"attention {heads}/{kv_heads} heads, {past} tokens, {cache}", mine, nbytes, peer=theirs)


def main() -> int:
    """Run the measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="a quarter of the shapes")
    given = parser.parse_args()
    device = CudaDevice(KernelCompiler())
    limit = gpu_figures.limits(device)
    rows: list[dict[str, Any]] = []
    wrong: list[str] = []
    shapes = ["o", "gate, up Fox"] if given.quick else list(_SHAPES)
    for kind in (GpuKind.BFLOAT16, GpuKind.FP8, GpuKind.INT8, GpuKind.INT4):
        for count in (1, 32):
            rows += [gpu_figures.row(f, limit) for f in matmuls(device, kind, count, given.repeat, shapes, wrong)]
        many = ["o"] if given.quick else ["o", "gate, up Fox"]
        rows += [gpu_figures.row(f, limit) for f in matmuls(device, kind, 4096, given.repeat, many, wrong)]
    for heads, kv_heads in ((16, 16), (16, 4)):
        for cache in ("f16", "int8", "fp8"):
            rows.append(gpu_figures.row(decode_attention(device, heads, kv_heads, 4096, cache, given.repeat), limit))
    gpu_figures.report(device, limit, rows)
    device.close()
    print("\n".join(wrong))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
