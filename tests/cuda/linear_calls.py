"""Requests to the launch planning in C++ (csrc/cuda/host): matmuls, and kernels over rows.

The comments of linear.h and rows.h describe the fields. Addresses are integers; 0: absent.
"""

from __future__ import annotations

import dataclasses
import re
import struct
from dataclasses import dataclass
from typing import Any

from edgelm.bundle.gpu_layout import GpuMatrix
from edgelm.runtimes.cuda import planning
from edgelm.runtimes.cuda.device import DeviceInfo, Launch
from edgelm.runtimes.cuda.kernels import sources

SKINNY_ROWS = 32
"""The largest number of rows for which a single matrix uses the skinny kernel."""


@dataclass(frozen=True)
class Matmul:
    """`Matmul` of linear.h."""

    matrix: GpuMatrix
    blob: int
    x: int
    y: int
    rows: int
    activation: str = "bf16"
    x_float: bool = False
    y_float: bool = False
    norm: int = 0
    residual: int = 0
    bias: int = 0
    row_map: int = 0
    offsets: int = 0
    x_rows: int = 0
    most_rows: int = 0
    rounding: float = 0.0
    epsilon: float = 1e-5


def fields_of(**values: Any) -> dict[str, planning.Field]:
    """Return the fields of a request: those of a matrix NAME are NAME_kind, NAME_rows and so on."""
    fields: dict[str, planning.Field] = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(value):
            parts = {part.name: getattr(value, part.name) for part in dataclasses.fields(value)}
            fields |= fields_of(**{f"{name}_{part}": inner for part, inner in parts.items()})
        else:
            fields[name] = value
    return fields


def request_of(request: Any, **more: Any) -> dict[str, planning.Field]:
    """Return the fields of a request that is a dataclass, and more fields."""
    parts = {part.name: getattr(request, part.name) for part in dataclasses.fields(request)}
    return fields_of(**parts, **more)


def device_fields(info: DeviceInfo) -> dict[str, int]:
    """Return the fields that describe a device."""
    return {"sm": info.sm, "multiprocessors": info.multiprocessors}


def all_kernels() -> tuple[str, ...]:
    """Return the name of every kernel of linear.cuh."""
    return kernels_in("linear/linear.cuh")


def kernels_in(header: str) -> tuple[str, ...]:
    """Return the name of every kernel of a header."""
    return tuple(name for name, kernel in sources.kernels().items() if kernel.header == header)


def kernels_of(matrix: GpuMatrix, activation: str, rounding: float = 0.0) -> tuple[str, ...]:
    """Return every kernel that matmuls with this matrix may need."""
    fields = fields_of(matrix=matrix, activation=activation, rounding=rounding)
    return tuple(planning.call("matmul_kernels", fields).decode().split())


def workspace_bytes(matmul: Matmul) -> int:
    """Return the bytes of scratch memory that `matmul_launches` needs."""
    return int(planning.call("matmul_workspace", request_of(matmul)))


def matmul_launches(matmul: Matmul, info: DeviceInfo, workspace: int = 0) -> list[Launch]:
    """Return the launches of a matmul."""
    return planning.launches("matmul", request_of(matmul, workspace=workspace, **device_fields(info)))


def skinny_plan(launch: Launch) -> dict[str, int]:
    """Return the SkinnyPlan of a launch of linear_skinny, by field."""
    text = (sources.SOURCES / "linear" / "linear_args.cuh").read_text(encoding="utf-8")
    body = text[text.index("struct SkinnyPlan {") :]
    names = re.findall(r"^  [iu]32 (\w+);", body[: body.index("};")], re.MULTILINE)
    return dict(zip(names, struct.unpack_from(f"<{len(names)}I", launch.args, 144), strict=True))


def convert_launch(
    x: int, y: int, rows: int, columns: int, *, source: str, target: str, x_float: bool = True, norm: int = 0,
    epsilon: float = 1e-5, rounding: float = 0.0, scales: int = 0,
) -> Launch:  # fmt: skip
    """Return the launch that normalises, converts or rounds rows."""
    return _one("convert", locals())


def rms_norm_launch(
    x: int, weight: int, y: int, rows: int, columns: int, *, source: str = "f32", residual: int = 0,
    epsilon: float = 1e-5,
) -> Launch:  # fmt: skip
    """Return the launch of an RMSNorm of rows."""
    return _one("rms_norm", locals())


def embedding_launch(ids: int, matrix: GpuMatrix, blob: int, y: int, rows: int) -> Launch:
    """Return the launch that looks up rows of an embedding's table."""
    return _one("embedding", locals())


def last_token_launch(x: int, y: int, batch: int, tokens: int, columns: int) -> Launch:
    """Return the launch that copies the row of each sequence's last token."""
    return _one("last_token", locals())


def argmax_workspace_bytes(rows: int, columns: int) -> int:
    """Return the bytes of scratch memory that `argmax_launches` needs."""
    return int(planning.call("argmax_workspace", locals()))


def argmax_launches(x: int, ids: int, rows: int, columns: int, workspace: int) -> list[Launch]:
    """Return the launches of a row-wise argmax."""
    return planning.launches("argmax", locals())


def _one(function: str, values: dict[str, Any]) -> Launch:
    (launch,) = planning.launches(function, fields_of(**values))
    return launch
