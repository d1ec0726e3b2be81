"""Disassembles a cubin with NVIDIA's nvdisasm."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgelm.runtimes.cuda.kernels import cubin as cubins

LANES = 32


class SassError(RuntimeError):
    """The code cannot be disassembled or executed."""


def nvdisasm() -> Path | None:
    """Return the path of nvdisasm in the wheel `nvidia-cuda-nvdisasm`; None if it is not installed."""
    spec = importlib.util.find_spec("nvidia")  # a namespace package of many wheels
    places = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec is not None else []
    return next((path for place in places for path in sorted(place.glob("*/bin/nvdisasm"))), None)


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        address: its offset in the section.
        guard: the predicate under which it is executed, e.g. "!P0", or "".
        opcode: with modifiers, e.g. "LDG.E.128".
        operands: as printed.
        line: file and line of the source, if the cubin has line information.
    """

    address: int
    guard: str
    opcode: str
    operands: tuple[str, ...]
    line: str = ""

    @property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]

    def __str__(self) -> str:
        guard = f"@{self.guard} " if self.guard else ""
        return f"{self.address:05x} {guard}{self.opcode} {', '.join(self.operands)}".rstrip()


@dataclass(frozen=True, eq=False)
class Code:
    """A compiled kernel.

    Attributes:
        kernel: its name.
        sm: the SM that it was compiled for.
        instructions: the kernel's and its subroutines', in order.
        labels: addresses by label.
        arguments: offset of the kernel's arguments in bank 0 of constants.
        constants: the other banks, by number.
    """

    kernel: str
    sm: int
    instructions: tuple[Instruction, ...]
    labels: Mapping[str, int]
    arguments: int
    constants: Mapping[int, bytes]

    def __str__(self) -> str:
        return "\n".join(map(str, self.instructions))


_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_LABEL = re.compile(r"^([.$\w]+):")
_LINE = re.compile(r'//## File "([^"]+)", line (\d+)')


def disassemble(cubin: bytes, sm: int) -> dict[str, Code]:
    """Return the code of every kernel of a cubin.

    Raises:
        SassError: nvdisasm is missing or refuses the file.
    """
    program = nvdisasm()
    if program is None:
        raise SassError("nvdisasm is missing: pip install nvidia-cuda-nvdisasm")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([program, "-c", "-g", file.name], capture_output=True, text=True)
        if done.returncode:
            raise SassError(f"nvdisasm failed: {done.stderr.strip()[:500]}")
    sections = {section.name: section for section in cubins._sections(cubin)}
    data = {name: cubin[one.offset : one.offset + one.size] for name, one in sections.items()}
    kernels: dict[str, Code] = {}
    for section in re.split(r"^\s*\.section\s+\.text\.", done.stdout, flags=re.MULTILINE)[1:]:
        name = re.split(r"[,\s]", section, maxsplit=1)[0]
        instructions, labels = _parse(section)
        records = cubins._records(cubin, sections[f".nv.info.{name}"])
        offset = next(int.from_bytes(value[4:6], "little") for kind, value in records if kind == cubins._ARGUMENTS)
        banks = {bank: data.get(f".nv.constant{bank}.{name}", b"") for bank in (2, 3, 4)}
        kernels[name] = Code(name, sm, instructions, labels, offset, banks)
    return kernels


def _parse(text: str) -> tuple[tuple[Instruction, ...], dict[str, int]]:
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    pending: list[str] = []
    line = ""
    for row in text.splitlines():
        if found := _LINE.search(row):
            line = f"{Path(found[1]).name}:{found[2]}"
        elif found := _INSTRUCTION.match(row):
            address = int(found[1], 16)
            labels |= dict.fromkeys(pending, address)
            pending = []
            operands = tuple(part.strip() for part in re.split(r",(?![^\[]*\])", found[4]) if part.strip())
            instructions.append(Instruction(address, found[2] or "", found[3], operands, line))
        elif found := _LABEL.match(row):
            pending.append(found[1])
    return tuple(instructions), labels


def target(code: Code, token: str) -> int:
    """Return the index of the instruction that a branch goes to."""
    label = re.fullmatch(r"`\((.*)\)", token)
    address = code.labels[label[1]] if label else int(token, 16)
    return address // 16
