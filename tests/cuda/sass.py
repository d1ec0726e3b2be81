"""Disassembles a cubin with NVIDIA's nvdisasm, and executes the machine code (SASS) of one block on the CPU.

`execute` counts the instructions that warps issue; it is not a test of results. Integers, predicates, branches, shared
and global memory are exact, since they decide which instructions are executed. Products of tensor cores and conversions
between float formats are replaced by a constant (`_CONSTANT_RESULTS`). An instruction that is not known is an error, so
a count is never made of guesses.

NVIDIA documents SASS by the names of its instructions only (CUDA Binary Utilities, "Instruction Set Reference"). What
they compute was inferred from compiled code; `test_sass.py` compares integer functions with Python's arithmetic.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import subprocess
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

LANES = 32
NVDISASM_VARIABLE = "EDGELM_NVDISASM"
DEFAULT_WORD = 0x3C003C00
"""Contents of memory that nothing wrote: 1.0 as float16, 0.0078 as float32 or bfloat16."""
_STEPS = 4_000_000


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
    """The instructions of a kernel and its subroutines in order, and the addresses of labels."""

    kernel: str
    sm: int
    instructions: tuple[Instruction, ...]
    labels: Mapping[str, int]

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
    kernels: dict[str, Code] = {}
    for section in re.split(r"^\s*\.section\s+\.text\.", done.stdout, flags=re.MULTILINE)[1:]:
        name = re.split(r"[,\s]", section, maxsplit=1)[0]
        kernels[name] = _parse(name, sm, section)
    return kernels


def _parse(kernel: str, sm: int, text: str) -> Code:
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
    return Code(kernel, sm, tuple(instructions), labels)


# -- memory ------------------------------------------------------------------------------------------------------------

_PAGE = 12


class Memory:
    """Global memory: bytes that were written, `DEFAULT_WORD` elsewhere."""

    def __init__(self) -> None:
        self._pages: dict[int, np.ndarray[Any, Any]] = {}

    def write(self, address: int, data: bytes) -> None:
        """Write bytes."""
        for i, byte in enumerate(data):
            self._page((address + i) >> _PAGE)[(address + i) & 4095] = byte

    def read(self, address: int, nbytes: int) -> bytes:
        """Return bytes."""
        default = DEFAULT_WORD.to_bytes(4, "little")
        found = bytearray()
        for at in range(address, address + nbytes):
            page = self._pages.get(at >> _PAGE)
            found.append(default[at & 3] if page is None else int(page[at & 4095]))
        return bytes(found)

    def load(self, addresses: np.ndarray[Any, Any], nbytes: int, lanes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return words [max(1, nbytes / 4), 32] of the given lanes."""
        words = max(1, nbytes // 4)
        default = DEFAULT_WORD if nbytes >= 4 else DEFAULT_WORD & ((1 << 8 * nbytes) - 1)
        out = np.full((words, LANES), default, np.uint32)
        pages = set((addresses[lanes] >> _PAGE).tolist())
        if not self._pages.keys().isdisjoint(pages):
            for lane in np.flatnonzero(lanes).tolist():
                data = self.read(int(addresses[lane]), nbytes)
                out[:, lane] = np.frombuffer(data.ljust(4, b"\0"), "<u4")
        return out

    def store(self, addresses: Any, values: Any, nbytes: int, lanes: np.ndarray[Any, Any]) -> None:
        """Store words [n, 32] of the given lanes."""
        for lane in np.flatnonzero(lanes).tolist():
            data = b"".join(int(word).to_bytes(4, "little") for word in values[:, lane])[:nbytes]
            address = int(addresses[lane])
            page, at = self._page(address >> _PAGE), address & 4095
            page[at : at + nbytes] = np.frombuffer(data, np.uint8)

    def _page(self, number: int) -> np.ndarray[Any, Any]:
        if number not in self._pages:
            self._pages[number] = np.frombuffer(DEFAULT_WORD.to_bytes(4, "little") * 1024, np.uint8).copy()
        return self._pages[number]


# -- state -------------------------------------------------------------------------------------------------------------


@dataclass
class Access:
    """A load from global memory by a warp.

    Attributes:
        issued: how many instructions the warp had issued before it.
        index: of the instruction.
        first: the lowest address.
        nbytes: bytes of all lanes.
        lanes: number of lanes.
    """

    issued: int
    index: int
    first: int
    nbytes: int
    lanes: int


@dataclass
class Trace:
    """What a warp executed.

    Attributes:
        counts: how often it issued each instruction of the code.
        loads: its loads and asynchronous copies from global memory, in order.
        marks: how many instructions had been issued before each execution of an instruction of `MARKED`, and its index.
    """

    block: tuple[int, int, int]
    warp: int
    counts: np.ndarray[Any, Any]
    loads: list[Access] = field(default_factory=list)
    marks: list[tuple[int, int]] = field(default_factory=list)
    issued: int = 0
    stored: int = 0


MARKED = ("HMMA", "QMMA", "BAR", "ACQBULK", "PREEXIT", "I2F")


@dataclass(eq=False)
class _Barrier:
    """A convergence barrier: the lanes that take part, and those that wait."""

    members: np.ndarray[Any, Any]
    arrived: np.ndarray[Any, Any]


class _Block:
    def __init__(self, code: Code, launch: Launched, block: tuple[int, int, int], memory: Memory) -> None:
        self.code, self.launch, self.block, self.memory = code, launch, block, memory
        self.shared = np.full((1024 + launch.shared) // 4 + 64, 0x7FC0FFFF, np.uint32)
        self.bytes = self.shared.view(np.uint8)
        self.constants = launch.constants(code.sm)


@dataclass(frozen=True)
class Launched:
    """The launch to execute: blocks, threads of a block, bytes of shared memory, argument bytes, and the offset of the
    arguments in the bank of constants."""

    grid: tuple[int, int, int]
    threads: int
    shared: int
    args: bytes
    args_offset: int

    def constants(self, sm: int) -> np.ndarray[Any, Any]:
        """Return the words of bank 0."""
        bank = bytearray(self.args_offset + len(self.args) + 64)
        sizes = np.array([self.threads, 1, 1, *self.grid], "<u4").tobytes()
        threads_at, grid_at = (0, 12) if sm < 100 else (0x360, 0x370)
        bank[threads_at : threads_at + 12] = sizes[:12]
        bank[grid_at : grid_at + 12] = sizes[12:]
        bank[self.args_offset : self.args_offset + len(self.args)] = self.args
        bank += bytes(-len(bank) % 4)
        return np.frombuffer(bytes(bank), "<u4")


class _Warp:
    def __init__(self, block: _Block, number: int, executable: Sequence[_Executable]) -> None:
        self.block, self.number, self.executable = block, number, executable
        self.r = np.zeros((260, LANES), np.uint32)
        self.u = np.zeros(260, np.uint32)
        self.p = np.zeros((10, LANES), bool)
        self.up = np.zeros(10, bool)
        self.p[7] = self.up[7] = True
        threads = np.arange(number * LANES, (number + 1) * LANES)
        self.live = threads < block.launch.threads
        self.tid = threads.astype(np.uint32)
        self.barriers: dict[str, list[_Barrier]] = {}
        self.ready: list[tuple[int, np.ndarray[Any, Any]]] = [(0, self.live.copy())]
        self.waiting: list[tuple[int, np.ndarray[Any, Any], _Barrier]] = []
        self.current = 0
        self.trace = Trace(block.block, number, np.zeros(len(executable), np.int64))

    # -- control -------------------------------------------------------------------------------------------------------

    def run(self) -> Generator[None, None, None]:
        """Execute until all lanes have exited; stop at each barrier of the block."""
        trace, counts = self.trace, self.trace.counts
        while self.ready:
            index, mask = self._take()
            while True:
                if trace.issued > _STEPS:
                    raise SassError(f"{self.block.code.kernel}: {_STEPS} instructions and no end")
                executable = self.executable[index]
                counts[index] += 1
                self.current = index
                if executable.mark:
                    trace.marks.append((trace.issued, index))
                active = mask if executable.guard is None else mask & executable.guard(self)
                if executable.control is None:
                    if executable.guard is None or active.any():
                        executable.run(self, active)
                    trace.issued += 1
                    index += 1
                    continue
                following = executable.control(self, index, mask, active)
                trace.issued += 1
                if following is _BARRIER:
                    yield
                    index += 1
                elif following is None:
                    break
                else:
                    index, mask = following

    def _take(self) -> tuple[int, np.ndarray[Any, Any]]:
        index = min(entry[0] for entry in self.ready)
        mask = np.zeros(LANES, bool)
        for entry in self.ready:
            if entry[0] == index:
                mask |= entry[1]
        self.ready = [entry for entry in self.ready if entry[0] != index]
        return index, mask

    def exit(self, lanes: np.ndarray[Any, Any]) -> None:
        """End lanes, and release barriers that wait for nothing else."""
        self.live = self.live & ~lanes
        for entry in list(self.waiting):
            index, mask, barrier = entry
            if not (barrier.members & self.live & ~barrier.arrived).any():
                self.waiting.remove(entry)
                self.ready.append((index, mask))


_BARRIER: Any = object()


@dataclass
class _Executable:
    guard: Callable[[_Warp], Any] | None
    run: Callable[[_Warp, Any], None]
    control: Callable[[_Warp, int, Any, Any], Any] | None = None
    mark: bool = False


# -- operands ----------------------------------------------------------------------------------------------------------

_Get = Callable[[_Warp], Any]
_REGISTER = re.compile(r"(U?)R(\d+|Z)")
_PREDICATE = re.compile(r"(U?)P(\d|T)")
_CONSTANT = re.compile(r"c\[(0x[0-9a-f]+)\]\[([^\]]*)\]")
_IMMEDIATE = re.compile(r"-?0x[0-9a-f]+")
_SPECIAL_FLOATS = {"+INF": np.inf, "-INF": -np.inf, "INF": np.inf, "+QNAN": np.nan, "-QNAN": np.nan, "QNAN": np.nan}


def _row(token: str) -> tuple[bool, int]:
    match = _REGISTER.fullmatch(token)
    if match is None:
        raise SassError(f"not a register: {token}")
    return bool(match[1]), 255 if match[2] == "Z" else int(match[2])


def _predicate(token: str) -> _Get:
    negate = token.startswith("!")
    match = _PREDICATE.fullmatch(token.lstrip("!"))
    if match is None:
        raise SassError(f"not a predicate: {token}")
    row, uniform = 7 if match[2] == "T" else int(match[2]), bool(match[1])
    if uniform:
        return (lambda w: ~w.up[row]) if negate else (lambda w: w.up[row])
    return (lambda w: ~w.p[row]) if negate else (lambda w: w.p[row])


def _is_predicate(token: str) -> bool:
    return _PREDICATE.fullmatch(token.lstrip("!")) is not None


def _word(token: str) -> tuple[_Get, _Get]:
    """Return getters of the low and the high word of a register pair, constant or immediate."""
    if match := _REGISTER.fullmatch(token):
        uniform, row = _row(token)
        high = 255 if row == 255 else row + 1
        if uniform:
            return (lambda w: w.u[row]), (lambda w: w.u[high])
        return (lambda w: w.r[row]), (lambda w: w.r[high])
    if match := _CONSTANT.fullmatch(token):
        bank, at = int(match[1], 16), match[2]
        if bank != 0 or not _IMMEDIATE.fullmatch(at):
            raise SassError(f"a bank of constants that is not known: {token}")
        index = int(at, 16) // 4
        return (lambda w: w.block.constants[index]), (lambda w: w.block.constants[index + 1])
    if _IMMEDIATE.fullmatch(token):
        value = int(token, 16)
        low, top = np.uint32(value & 0xFFFFFFFF), np.uint32(0xFFFFFFFF if value < 0 else 0)
        return (lambda w: low), (lambda w: top)
    raise SassError(f"an operand that is not known: {token}")


def _strip(token: str) -> tuple[str, str]:
    """Return the prefix (-, ~, |) and the token without it and without .reuse and .64."""
    token = re.sub(r"\.(reuse|64|U32|32)\b", "", token)
    match = re.fullmatch(r"([-~]?\|?)(.*?)\|?", token)
    assert match is not None
    if match[1] == "-" and re.match(r"0x|\d|INF|QNAN", match[2]):
        return "", token
    return match[1], match[2]


def _integer(token: str) -> _Get:
    prefix, bare = _strip(token)
    get = _word(bare)[0]
    if prefix == "-":
        return lambda w: np.uint32(0) - get(w)
    if prefix == "~":
        return lambda w: ~get(w)
    if prefix:
        raise SassError(f"an operand that is not known: {token}")
    return get


def _byte(token: str) -> _Get:
    match = re.fullmatch(r"(U?R\w+?)(?:\.B([0-3]))?", token)
    if match is None:
        raise SassError(f"not a byte: {token}")
    get, shift = _word(match[1])[0], np.uint32(8 * int(match[2] or 0))
    return lambda w: get(w) >> shift & np.uint32(255)


def _addend(token: str) -> _Get:
    """A term of a sum with carry, as uint64: -x is 2^32 - x."""
    prefix, bare = _strip(token)
    get = _word(bare)[0]
    if prefix == "-":
        return lambda w: np.uint64(1 << 32) - _u64(get(w))
    if prefix == "~":
        return lambda w: _u64(~get(w))
    return lambda w: _u64(get(w))


def _pair(token: str) -> _Get:
    prefix, bare = _strip(token)
    low, high = _word(bare)
    get: _Get = lambda w: _u64(low(w)) | _u64(high(w)) << np.uint64(32)  # noqa: E731
    if prefix == "-":
        return lambda w: np.uint64(0) - get(w)
    if prefix == "~":
        return lambda w: ~get(w)
    return get


def _float(token: str) -> _Get:
    prefix, bare = _strip(token)
    half = re.fullmatch(r"(\w+)\.H([01])_H[01]", bare)
    if half:
        get = _word(half[1])[0]
        shift = np.uint32(16 * int(half[2]))
        base: _Get = lambda w: (get(w) >> shift & np.uint32(0xFFFF)).astype(np.uint16).view(np.float16).astype("f4")  # noqa: E731
    elif _REGISTER.fullmatch(bare) or _CONSTANT.fullmatch(bare) or bare.startswith("0x"):
        word = _word(bare)[0]
        base = lambda w: word(w).view(np.float32)  # noqa: E731
    else:
        value = np.float32(_SPECIAL_FLOATS[bare] if bare in _SPECIAL_FLOATS else float(bare))
        base = lambda w: value  # noqa: E731
    if "|" in prefix:
        inner = base
        base = lambda w: np.abs(inner(w))  # noqa: E731
    if prefix.startswith("-"):
        return lambda w: -base(w)
    return base


def _u64(x: Any) -> Any:
    return x.astype(np.uint64)


def _s64(x: Any) -> Any:
    return x.view(np.int32).astype(np.int64)


def _low(x: Any) -> Any:
    return (x & np.uint64(0xFFFFFFFF)).astype(np.uint32)


def _high(x: Any) -> Any:
    return (x >> np.uint64(32)).astype(np.uint32)


def _bits(x: Any) -> Any:
    return np.asarray(x, np.float32).view(np.uint32)


# -- instructions that compute -----------------------------------------------------------------------------------------

_Compute = Callable[[_Warp], tuple[Any, ...]]


def _iadd3(ins: Instruction, out: list[str], ops: list[str]) -> _Compute:
    carries = [_predicate(op) for op in ops[3:]] if ".X" in ins.opcode else []
    terms = [_addend(op) for op in ops[:3]]

    def compute(w: _Warp) -> tuple[Any, ...]:
        total = terms[0](w)
        for term in terms[1:]:
            total = total + term(w)
        for carry in carries:
            total = total + _u64(np.asarray(carry(w)))
        top = total >> np.uint64(32)
        return (_low(total), top > 0, top > 1)[: len(out)]

    return compute


def _imad(ins: Instruction, out: list[str], ops: list[str]) -> _Compute:
    parts = ins.opcode.split(".")
    unsigned = "U32" in parts
    if "WIDE" in parts or "HI" in parts:
        a, b = _integer(ops[0]), _integer(ops[1])
        c = _pair(ops[2]) if len(ops) > 2 else lambda w: np.uint64(0)
        carry = _predicate(ops[3]) if "X" in parts else None
        wide = "WIDE" in parts

        def compute(w: _Warp) -> tuple[Any, ...]:
            x, y = a(w), b(w)
            product = _u64(x) * _u64(y) if unsigned else (_s64(x) * _s64(y)).view(np.uint64)
            addend = c(w)
            total = product + addend
            over = total < product
            if carry is not None:
                total = total + _u64(np.asarray(carry(w)))
            values = (_low(total), _high(total)) if wide else (_high(total),)
            return (*values, over)[: len(out)]

        return compute
    a, b, c = (_integer(op) for op in ops[:3])
    carry = _predicate(ops[3]) if "X" in parts else None

    def plain(w: _Warp) -> tuple[Any, ...]:
        total = a(w) * b(w) + c(w)
        return (total if carry is None else total + np.asarray(carry(w)).astype(np.uint32),)

    return plain


def _lea(ins: Instruction, out: list[str], ops: list[str]) -> _Compute:
    parts = ins.opcode.split(".")
    if "HI" not in parts:
        a, b, shift = _integer(ops[0]), _addend(ops[1]), np.uint32(int(ops[2], 16))

        def compute(w: _Warp) -> tuple[Any, ...]:
            total = _u64(a(w) << shift) + b(w)
            return (_low(total), total >> np.uint64(32) > 0)[: len(out)]

        return compute
    extended = "SX32" in parts
    a, b = _integer(ops[0]), _integer(ops[1])
    c = None if extended else _integer(ops[2])
    at = 2 if extended else 3
    places = np.uint64(int(ops[at], 16))
    carry = _predicate(ops[at + 1]) if "X" in parts else None

    def high(w: _Warp) -> tuple[Any, ...]:
        low = a(w)
        whole = _s64(low).view(np.uint64) if c is None else _u64(low) | _u64(c(w)) << np.uint64(32)
        total = _high(whole << places) + b(w)
        return (total if carry is None else total + np.asarray(carry(w)).astype(np.uint32),)

    return high


def _shift(ins: Instruction, out: list[str], ops: list[str]) -> _Compute:
    parts = ins.opcode.split(".")
    left, high, wrap = "L" in parts[1], "HI" in parts, "W" in parts
    wide, signed = any(p in parts for p in ("U64", "S64")), any(p in parts for p in ("S32", "S64"))
    low, by, top = _integer(ops[0]), _integer(ops[1]), _integer(ops[2])
    most = np.uint32(63 if wide else 32)

    def compute(w: _Warp) -> tuple[Any, ...]:
        amount = by(w)
        amount = amount & np.uint32(63 if wide else 31) if wrap else np.minimum(amount, most)
        places = _u64(amount)
        value = _u64(low(w)) | _u64(top(w)) << np.uint64(32)
        if left:
            value = value << places
        elif signed:
            value = (value.view(np.int64) >> places.view(np.int64)).view(np.uint64)
        else:
            value = value >> places
        return (_high(value) if high else _low(value),)

    return compute


_COMPARE: Mapping[str, Callable[[Any, Any], Any]] = {
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
}


def _combine(parts: Sequence[str]) -> Callable[[Any, Any], Any]:
    return (lambda a, b: a | b) if "OR" in parts else (lambda a, b: a ^ b) if "XOR" in parts else (lambda a, b: a & b)


def _isetp(ins: Instruction, out: list[str], ops: list[str]) -> _Compute:
    parts = ins.opcode.split(".")
    compare, combine, signed = _COMPARE[parts[1]], _combine(parts), "U32" not in parts
    a, b, other = _integer(ops[0]), _integer(ops[1]), _predicate(ops[2])
    before = _predicate(ops[3]) if "EX" in parts else None
    strict = {"LE": "LT", "GE": "GT"}.get(parts[1], parts[1])

    def compute(w: _Warp) -> tuple[Any, ...]:
        x, y = np.asarray(a(w)), np.asarray(b(w))
        if signed:
            x, y = x.view(np.int32), y.view(np.int32)
        if before is None:
            found = compare(x, y)
        elif strict == "NE":
            found = (x != y) | before(w)
        elif strict == "EQ":
            found = (x == y) & before(w)
        else:
            found = _COMPARE[strict](x, y) | ((x == y) & before(w))
        return combine(found, other(w)), combine(~found, other(w))

    return compute


def _fsetp(ins: Instruction, out: list[str], ops: list[str]) -> _Compute:
    parts = ins.opcode.split(".")
    combine, kind = _combine(parts), parts[1]
    a, b, other = _float(ops[0]), _float(ops[1]), _predicate(ops[2])

    def compute(w: _Warp) -> tuple[Any, ...]:
        x, y = np.asarray(a(w)), np.asarray(b(w))
        nan = np.isnan(x) | np.isnan(y)
        if kind in ("NAN", "NUM"):
            found = nan if kind == "NAN" else ~nan
        elif kind.endswith("U") and kind != "U":
            found = nan | _COMPARE[kind[:-1]](x, y)
        else:
            found = _COMPARE[kind](x, y) & ~nan
        return combine(found, other(w)), combine(~found, other(w))

    return compute


def _table(lut: int, a: Any, b: Any, c: Any, ones: Any) -> Any:
    """Bitwise function of three operands; bit 4 a + 2 b + c of `lut` is its result."""
    total = a & ~a
    for index in range(8):
        if lut >> index & 1:
            one = (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c)
            total = total | one
    return total & ones


def _lop3(ins: Instruction, out: list[str], ops: list[str]) -> _Compute:
    a, b, c = (_integer(op) for op in ops[:3])
    lut, other = int(ops[3], 16), _predicate(ops[4])

    def compute(w: _Warp) -> tuple[Any, ...]:
        value = _table(lut, a(w), b(w), c(w), np.uint32(0xFFFFFFFF))
        return ((value != 0) | other(w), value) if len(out) > 1 else (value,)

    return compute


def _plop3(ins: Instruction, out: list[str], ops: list[str]) -> _Compute:
    a, b, c = (_predicate(op) for op in ops[:3])
    luts = int(ops[3], 16), int(ops[4], 16)

    def compute(w: _Warp) -> tuple[Any, ...]:
        values = [np.asarray(get(w)) for get in (a, b, c)]
        return tuple(_table(lut, *values, np.bool_(True)) for lut in luts)

    return compute


def _prmt(ins: Instruction, out: list[str], ops: list[str]) -> _Compute:
    if len(ins.opcode.split(".")) > 1:
        raise SassError(f"not known: {ins}")
    a, selector, b = (_integer(op) for op in ops[:3])

    def compute(w: _Warp) -> tuple[Any, ...]:
        source = _u64(np.asarray(a(w))) | _u64(np.asarray(b(w))) << np.uint64(32)
        chosen = np.asarray(selector(w)).astype(np.uint64)
        total = np.uint64(0) * source
        for i in range(4):
            nibble = chosen >> np.uint64(4 * i) & np.uint64(15)
            byte = source >> ((nibble & np.uint64(7)) * np.uint64(8)) & np.uint64(255)
            byte = np.where(nibble & np.uint64(8), (byte >> np.uint64(7)) * np.uint64(255), byte)
            total = total | byte << np.uint64(8 * i)
        return (_low(total),)

    return compute


def _minmax(ins: Instruction, out: list[str], ops: list[str]) -> _Compute:
    parts = ins.opcode.split(".")
    signed, added = "U32" not in parts, ins.name.startswith("VIADD")
    gets = [_integer(op) for op in ops[: 3 if added else 2]]
    lowest, relu = _predicate(ops[3 if added else 2]), "RELU" in parts

    def compute(w: _Warp) -> tuple[Any, ...]:
        values = [np.asarray(get(w)) for get in gets]
        if added:
            values = [values[0] + values[1], values[2]]
        if signed:
            values = [value.view(np.int32) for value in values]
        found = np.where(lowest(w), np.minimum(*values), np.maximum(*values))
        if relu:
            found = np.maximum(found, 0)
        return (found.view(np.uint32) if signed else found,)

    return compute


def _select(ins: Instruction, out: list[str], ops: list[str]) -> _Compute:
    a, b, which = _integer(ops[0]), _integer(ops[1]), _predicate(ops[2])
    return lambda w: (np.where(which(w), a(w), b(w)),)


def _fselect(ins: Instruction, out: list[str], ops: list[str]) -> _Compute:
    a, b, which = _float(ops[0]), _float(ops[1]), _predicate(ops[2])
    return lambda w: (_bits(np.where(which(w), a(w), b(w))),)


def _move(ins: Instruction, out: list[str], ops: list[str]) -> _Compute:
    if len(out) == 2:
        low, high = _word(_strip(ops[0])[1]) if ops[0] != "SRZ" else _word("RZ")
        return lambda w: (low(w), high(w))
    get = _integer(ops[0] if ops[0] != "SRZ" else "RZ")
    return lambda w: (get(w),)


def _one_integer(function: Callable[[Any], Any]) -> Callable[..., _Compute]:
    def make(ins: Instruction, out: list[str], ops: list[str]) -> _Compute:
        get = _integer(ops[0])
        return lambda w: (function(np.asarray(get(w))).astype(np.uint32),)

    return make


def _leading(x: Any) -> Any:
    """The position of the highest set bit; all ones if there is none."""
    exponent = np.frexp(x.astype(np.float64))[1].astype(np.int64) - 1
    return np.where(x == 0, -1, exponent).astype(np.int32).view(np.uint32)


def _flo(ins: Instruction, out: list[str], ops: list[str]) -> _Compute:
    if "U32" not in ins.opcode:
        raise SassError(f"not known: {ins}")
    get, shift = _integer(ops[0]), ".SH" in ins.opcode

    def compute(w: _Warp) -> tuple[Any, ...]:
        x = np.asarray(get(w))
        found = _leading(x)
        return (np.where(x == 0, found, np.uint32(31) - found) if shift else found,)

    return compute


def _reversed_bits(x: Any) -> Any:
    total = np.uint32(0) * x
    for i in range(32):
        total = total | (x >> np.uint32(i) & np.uint32(1)) << np.uint32(31 - i)
    return total


def _floats(function: Callable[..., Any], count: int) -> Callable[..., _Compute]:
    def make(ins: Instruction, out: list[str], ops: list[str]) -> _Compute:
        gets = [_float(op) for op in ops[:count]]
        return lambda w: (_bits(function(*(get(w) for get in gets))),)

    return make


def _fminmax(ins: Instruction, out: list[str], ops: list[str]) -> _Compute:
    a, b, lowest = _float(ops[0]), _float(ops[1]), _predicate(ops[2])
    return lambda w: (_bits(np.where(lowest(w), np.fmin(a(w), b(w)), np.fmax(a(w), b(w)))),)


_MUFU: Mapping[str, Callable[[Any], Any]] = {
    "RCP": lambda x: np.float32(1) / x,
    "RSQ": lambda x: np.float32(1) / np.sqrt(x),
    "SQRT": np.sqrt,
    "EX2": np.exp2,
    "LG2": np.log2,
    "TANH": np.tanh,
}


def _mufu(ins: Instruction, out: list[str], ops: list[str]) -> _Compute:
    kind = ins.opcode.split(".")[1]
    if kind not in _MUFU:
        raise SassError(f"not known: {ins}")
    get, function = _float(ops[0]), _MUFU[kind]
    return lambda w: (_bits(function(np.asarray(get(w), np.float32))),)


def _to_float(ins: Instruction, out: list[str], ops: list[str]) -> _Compute:
    parts = ins.opcode.split(".")
    if any(part in parts for part in ("F64", "F16", "S64", "S8", "U16", "S16")):
        raise SassError(f"not known: {ins}")
    wide = "U64" in parts
    get = _pair(ops[0]) if wide else _byte(ops[0]) if "U8" in parts else _integer(ops[0])
    # I2F.RP of a register whose sign was removed; I2FP.F32.S32 converts with a sign.
    signed, up = not (wide or "U32" in parts or "U8" in parts), "RP" in parts

    def compute(w: _Warp) -> tuple[Any, ...]:
        value = np.asarray(get(w))
        exact = _s64(value).astype(np.float64) if signed else value.astype(np.float64)
        found = exact.astype(np.float32)
        if up:
            found = np.where(found.astype(np.float64) < exact, np.nextafter(found, np.float32(np.inf)), found)
        return (_bits(found),)

    return compute


def _to_integer(ins: Instruction, out: list[str], ops: list[str]) -> _Compute:
    parts = ins.opcode.split(".")
    if "TRUNC" not in parts and len(parts) > 1 and parts[1] not in ("U32", "S32", "NTZ", "FTZ"):
        raise SassError(f"not known: {ins}")
    get, wide, signed = _float(ops[0]), "U64" in parts, not ("U32" in parts or "U64" in parts)
    limits = (0.0, 2.0**64 - 2048) if wide else (-(2.0**31), 2.0**31 - 1) if signed else (0.0, 2.0**32 - 1)
    rounded = np.trunc if "TRUNC" in parts else np.rint

    def compute(w: _Warp) -> tuple[Any, ...]:
        value = np.nan_to_num(np.asarray(get(w), np.float64), nan=0.0, posinf=limits[1], neginf=limits[0])
        whole = np.clip(rounded(value), *limits)
        if wide:
            both = whole.astype(np.uint64)
            return _low(both), _high(both)
        return ((whole.astype(np.int64).astype(np.int32).view(np.uint32) if signed else whole.astype(np.uint32)),)

    return compute


def _half_fma(ins: Instruction, out: list[str], ops: list[str]) -> _Compute:
    """As a move of a constant (0 * 0 + two halves); otherwise a constant result."""
    if len(ops) == 4 and ops[0].lstrip("-") == "RZ" and ops[1].lstrip("-") == "RZ":
        high, low = (int(np.float16(_SPECIAL_FLOATS.get(op) or float(op)).view(np.uint16)) for op in ops[2:])
        value = np.uint32(high << 16 | low)
        return lambda w: (value,)
    return _fixed(ins, out, ops)


def _fixed(ins: Instruction, out: list[str], ops: list[str]) -> _Compute:
    values = tuple(np.uint32(DEFAULT_WORD) for _ in out)
    return lambda w: values


_SPECIAL: Mapping[str, Callable[[_Warp], Any]] = {
    "SR_TID.X": lambda w: w.tid,
    "SR_TID.Y": lambda w: np.uint32(0),
    "SR_TID.Z": lambda w: np.uint32(0),
    "SR_CTAID.X": lambda w: np.uint32(w.block.block[0]),
    "SR_CTAID.Y": lambda w: np.uint32(w.block.block[1]),
    "SR_CTAID.Z": lambda w: np.uint32(w.block.block[2]),
    "SR_LANEID": lambda w: np.arange(LANES, dtype=np.uint32),
    "SR_LTMASK": lambda w: ((np.uint64(1) << np.arange(LANES, dtype=np.uint64)) - np.uint64(1)).astype(np.uint32),
    "SR_EQMASK": lambda w: (np.uint64(1) << np.arange(LANES, dtype=np.uint64)).astype(np.uint32),
    "SR_CgaCtaId": lambda w: np.uint32(0),
}


def _special(ins: Instruction, out: list[str], ops: list[str]) -> _Compute:
    if ops[0] not in _SPECIAL:
        raise SassError(f"not known: {ins}")
    get = _SPECIAL[ops[0]]
    return lambda w: (get(w),)


def _load_constant(ins: Instruction, out: list[str], ops: list[str]) -> _Compute:
    match = _CONSTANT.fullmatch(ops[0])
    if match is None:
        raise SassError(f"not known: {ins}")
    size = {"U8": 1, "S8": 1, "U16": 2, "64": 8, "128": 16}.get(ins.opcode.rpartition(".")[2], 4)
    bank, terms = int(match[1], 16), match[2].split("+")
    if bank != 0:

        def missing(w: _Warp) -> tuple[Any, ...]:
            raise SassError(f"{w.block.code.kernel} reads a bank of constants that is not known: {ins}")

        return missing
    fixed = sum(int(term, 16) for term in terms if term.startswith("0x"))
    moving = [_integer(term) for term in terms if not term.startswith("0x")]

    def compute(w: _Warp) -> tuple[Any, ...]:
        at = np.uint32(fixed)
        for get in moving:
            at = at + get(w)
        if size < 4:
            return (w.block.constants.view(np.uint8 if size == 1 else np.uint16)[at // size].astype(np.uint32),)
        return tuple(w.block.constants[at // 4 + i] for i in range(len(out)))

    return compute


_REDUCE: Mapping[str, Callable[[Any], Any]] = {"MAX": np.max, "MIN": np.min, "SUM": np.sum, "OR": np.bitwise_or.reduce}

_COMPUTE: dict[str, Callable[[Instruction, list[str], list[str]], _Compute]] = {
    "IADD3": _iadd3, "IADD": _iadd3, "IMAD": _imad, "LEA": _lea, "SHF": _shift, "ISETP": _isetp, "FSETP": _fsetp,
    "LOP3": _lop3, "PLOP3": _plop3, "PRMT": _prmt, "IMNMX": _minmax, "VIMNMX": _minmax, "VIADDMNMX": _minmax,
    "SEL": _select, "FSEL": _fselect, "MOV": _move, "CS2R": _move, "R2UR": _move, "FLO": _flo,
    "IABS": _one_integer(lambda x: np.abs(x.view(np.int32)).view(np.uint32)),
    "POPC": _one_integer(lambda x: np.bitwise_count(x)), "BREV": _one_integer(_reversed_bits),
    "FADD": _floats(lambda a, b: a + b, 2), "FMUL": _floats(lambda a, b: a * b, 2),
    "FFMA": _floats(lambda a, b, c: a * b + c, 3), "FMNMX": _fminmax, "MUFU": _mufu, "I2F": _to_float,
    "I2FP": _to_float, "F2I": _to_integer, "HFMA2": _half_fma, "S2R": _special, "S2UR": _special,
    "LDC": _load_constant,
}  # fmt: skip
_CONSTANT_RESULTS = ("HMMA", "QMMA", "F2FP", "HADD2", "HMUL2", "LDSM", "I2F16", "F2F", "FRND")
"""Instructions whose result is `DEFAULT_WORD`: it is data, no branch or address depends on it."""
_IGNORED = ("NOP", "YIELD", "PREEXIT", "ACQBULK", "LDGDEPBAR", "DEPBAR", "MEMBAR", "ERRBAR", "CGAERRBAR", "CCTL",
            "WARPSYNC", "ENDCOLLECTIVE", "CCTLL", "FENCE")  # fmt: skip
_WORDS = {"64": 2, "128": 4}


def _outputs(ins: Instruction) -> tuple[list[str], list[str]]:
    """Split the operands into results and sources; a wide result has a token for each register."""
    ops = list(ins.operands)
    name = ins.name
    count = 1
    if name in ("ISETP", "FSETP", "PLOP3"):
        return ops[:2], ops[2:]
    if name in ("LOP3", "SHFL") and _is_predicate(ops[0]):
        return ops[:2], ops[2:]
    if name in ("VOTE", "FCHK") or name.startswith("ATOM"):
        return ops[:2], ops[2:]
    while name in ("IADD3", "LEA", "IMAD") and _is_predicate(ops[count]) and not ops[count].startswith("!"):
        count += 1
    out, rest = ops[:count], ops[count:]
    words = _words_of(ins)
    if words > 1:
        uniform, row = _row(out[0])
        prefix = "UR" if uniform else "R"
        out = [*(out[0] if row == 255 else f"{prefix}{row + i}" for i in range(words)), *out[1:]]
    return out, rest


def _words_of(ins: Instruction) -> int:
    """How many registers the first result has."""
    parts = ins.opcode.split(".")
    if ins.name in ("LDC", "LDG", "LDS", "LD", "LDL"):
        return next((_WORDS[part] for part in parts if part in _WORDS), 1)
    if ins.name == "IMAD":
        return 2 if "WIDE" in parts else 1
    if ins.name == "CS2R":
        return 1 if "32" in parts else 2
    if ins.name == "F2I":
        return 2 if "U64" in parts or "S64" in parts else 1
    if ins.name in ("HMMA", "LDSM", "QMMA"):
        if ins.name == "LDSM":
            return int(parts[-1]) if parts[-1].isdigit() else 1
        return 4 if "F32" in parts else 2
    return 2 if ins.name == "MOV" and "64" in parts else 1


def _writer(out: list[str]) -> Callable[[_Warp, Any, tuple[Any, ...]], None]:
    """Return the function that writes results under a mask."""
    places: list[tuple[str, int]] = []
    for token in out:
        if _is_predicate(token):
            uniform, row = token.startswith("U"), token[-1]
            places.append(("up" if uniform else "p", 8 if row == "T" else int(row)))
        else:
            is_uniform, number = _row(token)
            places.append(("u" if is_uniform else "r", 256 if number == 255 else number))

    def write(w: _Warp, mask: Any, values: tuple[Any, ...]) -> None:
        for (kind, row), value in zip(places, values, strict=True):
            if kind == "r":
                np.copyto(w.r[row], value, where=mask)
            elif kind == "p":
                np.copyto(w.p[row], value, where=mask)
            elif mask.any():
                if np.ndim(value):
                    value = value[int(np.argmax(mask))]
                (w.u if kind == "u" else w.up)[row] = value

    return write


def _computing(ins: Instruction) -> Callable[[_Warp, Any], None]:
    name = ins.name
    uniform = name.startswith("U") and name[1:] in _COMPUTE
    plain = name[1:] if uniform else name
    if uniform:
        ins = Instruction(ins.address, ins.guard, ins.opcode[1:], ins.operands, ins.line)
    if plain == "VIADD":
        ins = Instruction(ins.address, ins.guard, ins.opcode, (*ins.operands, "RZ"), ins.line)
    if plain == "LDCU":
        plain = "LDC"
        ins = Instruction(ins.address, ins.guard, ins.opcode.replace("LDCU", "LDC"), ins.operands, ins.line)
    if plain not in _COMPUTE and plain != "VIADD" and plain not in _CONSTANT_RESULTS:
        raise SassError(f"an instruction that is not known: {ins}")
    out, ops = _outputs(ins)
    make = _fixed if plain in _CONSTANT_RESULTS else _COMPUTE["IADD3" if plain == "VIADD" else plain]
    if ins.opcode.startswith("HADD2.F32") and ops[0] == "-RZ":
        make = lambda i, o, s: (lambda get: lambda w: (_bits(get(w)),))(_float(s[1]))  # noqa: E731
    compute, write = make(ins, out, ops), _writer(out)
    return lambda w, mask: write(w, mask, compute(w))


# -- between lanes and memory ------------------------------------------------------------------------------------------


def _shuffle(ins: Instruction) -> Callable[[_Warp, Any], None]:
    out, ops = _outputs(ins)
    kind = ins.opcode.split(".")[1]
    value, by, control = (_integer(op) for op in ops)
    write = _writer(out)
    lane = np.arange(LANES)

    def run(w: _Warp, mask: Any) -> None:
        c = np.broadcast_to(control(w), LANES).astype(np.int64)
        b = np.broadcast_to(by(w), LANES).astype(np.int64) & 31
        clamp, segment = c & 31, c >> 8 & 31
        lowest, highest = lane & segment, (lane & segment) | (clamp & ~segment)
        if kind == "IDX":
            source, valid = lowest | (b & ~segment), None
            valid = source <= highest
        elif kind == "BFLY":
            source = lane ^ b
            valid = source <= highest
        elif kind == "UP":
            source = lane - b
            valid = source >= highest  # of UP the clamp is the lowest lane
        else:
            source = lane + b
            valid = source <= highest
        source = np.where(valid, source, lane)
        write(w, mask, (valid, np.broadcast_to(value(w), LANES)[source]))

    return run


def _vote(ins: Instruction) -> Callable[[_Warp, Any], None]:
    name = ins.operands[0]
    with_word = not _is_predicate(name)
    out = list(ins.operands[: 2 if with_word else 1])
    get = _predicate(ins.operands[-1])
    every, write = ".ALL" in ins.opcode, _writer(out)

    def run(w: _Warp, mask: Any) -> None:
        found = np.broadcast_to(get(w), LANES) & mask
        word = np.uint32(int((found.astype(np.uint64) << np.arange(LANES, dtype=np.uint64)).sum()))
        flag = np.bool_(bool((found == mask).all()) if every else bool(found.any()))
        write(w, mask, (word, flag) if with_word else (flag,))

    return run


def _reduce(ins: Instruction) -> Callable[[_Warp, Any], None]:
    parts = ins.opcode.split(".")
    function = _REDUCE["SUM" if parts[1] not in _REDUCE else parts[1]]
    get, write, signed = _integer(ins.operands[1]), _writer([ins.operands[0]]), "S32" in parts

    def run(w: _Warp, mask: Any) -> None:
        values = np.broadcast_to(get(w), LANES)[mask]
        found = function(values.view(np.int32) if signed else values)
        write(w, mask, (np.uint32(int(found) & 0xFFFFFFFF),))

    return run


_ADDRESS = re.compile(r"(?:desc\[U?R\d+\])?\[([^\]]*)\]")


def _address(token: str, *, wide: bool) -> _Get:
    match = _ADDRESS.fullmatch(token)
    if match is None:
        raise SassError(f"not an address: {token}")
    fixed, gets = 0, []
    for term in match[1].split("+"):
        if re.fullmatch(r"-?0x[0-9a-f]+", term):
            fixed += int(term, 16)
        elif term.endswith(".64") or (wide and term.startswith("R") and not term.endswith(".U32")):
            gets.append(_pair(term))
        else:
            get = _integer(term)
            gets.append(lambda w, get=get: _u64(get(w)))
    offset = np.uint64(fixed & 0xFFFFFFFFFFFFFFFF)

    def address(w: _Warp) -> Any:
        total: Any = np.full(LANES, offset)
        for get in gets:
            total = total + get(w)
        return total if wide else total & np.uint64(0xFFFFFFFF)

    return address


def _size(ins: Instruction) -> int:
    sizes = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
    return next((sizes[part] for part in ins.opcode.split(".") if part in sizes), 4)


def _global_load(ins: Instruction) -> Callable[[_Warp, Any], None]:
    out, ops = _outputs(ins)
    address, nbytes, write = _address(ops[0], wide=True), _size(ins), _writer(out)

    def run(w: _Warp, mask: Any) -> None:
        at = address(w)
        _record(w, at, nbytes, mask)
        write(w, mask, tuple(w.block.memory.load(at.astype(np.int64), nbytes, mask)))

    return run


def _record(w: _Warp, at: Any, nbytes: int, mask: Any) -> None:
    lanes = int(mask.sum())
    if lanes:
        w.trace.loads.append(Access(w.trace.issued, w.current, int(at[mask].min()), lanes * nbytes, lanes))


def _global_store(ins: Instruction) -> Callable[[_Warp, Any], None]:
    address, nbytes = _address(ins.operands[0], wide=True), _size(ins)
    words = max(1, nbytes // 4)
    uniform, row = _row(ins.operands[1])
    assert not uniform

    def run(w: _Warp, mask: Any) -> None:
        values = w.r[[255 if row == 255 else row + i for i in range(words)]]
        w.trace.stored += int(mask.sum()) * nbytes
        w.block.memory.store(address(w).astype(np.int64), values, nbytes, mask)

    return run


def _atomic(ins: Instruction) -> Callable[[_Warp, Any], None]:
    if "ADD" not in ins.opcode:
        raise SassError(f"not known: {ins}")
    shared = ins.name == "ATOMS"
    at = 1 if shared else 2
    out = [ins.operands[at - 1]]
    address, value, write = _address(ins.operands[at], wide=not shared), _integer(ins.operands[at + 1]), _writer(out)

    def run(w: _Warp, mask: Any) -> None:
        places, added = address(w).astype(np.int64), np.broadcast_to(value(w), LANES)
        before = np.zeros(LANES, np.uint32)
        for lane in np.flatnonzero(mask).tolist():
            one = np.arange(LANES) == lane
            if shared:
                word = int(places[lane]) // 4
                before[lane] = w.block.shared[word]
                w.block.shared[word] += added[lane]
            else:
                before[lane] = w.block.memory.load(places, 4, one)[0, lane]
                w.block.memory.store(places, (before + added)[None], 4, one)
        write(w, mask, (before,))

    return run


def _shared_load(ins: Instruction) -> Callable[[_Warp, Any], None]:
    out, ops = _outputs(ins)
    address, nbytes, write = _address(ops[0], wide=False), _size(ins), _writer(out)
    signed = any(part in ("S8", "S16") for part in ins.opcode.split("."))

    def run(w: _Warp, mask: Any) -> None:
        at = np.where(mask, address(w).astype(np.int64), 0)
        _check_shared(w, ins, at, nbytes)
        if nbytes >= 4:
            write(w, mask, tuple(w.block.shared[at // 4 + i] for i in range(nbytes // 4)))
            return
        found = w.block.bytes.view(np.uint8 if nbytes == 1 else np.uint16)[at // nbytes]
        if signed:
            found = found.view(np.int8 if nbytes == 1 else np.int16).astype(np.int32).view(np.uint32)
        write(w, mask, (found.astype(np.uint32),))

    return run


def _shared_store(ins: Instruction) -> Callable[[_Warp, Any], None]:
    address, nbytes = _address(ins.operands[0], wide=False), _size(ins)
    uniform, row = _row(ins.operands[1])
    assert not uniform

    def run(w: _Warp, mask: Any) -> None:
        at = address(w).astype(np.int64)[mask]
        _check_shared(w, ins, at, nbytes)
        if nbytes >= 4:
            for i in range(nbytes // 4):
                w.block.shared[at // 4 + i] = w.r[255 if row == 255 else row + i][mask]
        else:
            kind: Any = np.uint8 if nbytes == 1 else np.uint16
            w.block.bytes.view(kind)[at // nbytes] = w.r[row][mask].astype(kind)

    return run


def _check_shared(w: _Warp, ins: Instruction, at: Any, nbytes: int) -> None:
    if at.size and int(at.max()) + nbytes > w.block.bytes.size:
        raise SassError(f"{w.block.code.kernel}: {ins}: beyond shared memory at {int(at.max()):#x}")


def _copy_to_shared(ins: Instruction) -> Callable[[_Warp, Any], None]:
    to, source, nbytes = _address(ins.operands[0], wide=False), _address(ins.operands[1], wide=True), _size(ins)
    valid = _predicate(ins.operands[2]) if len(ins.operands) > 2 else None

    def run(w: _Warp, mask: Any) -> None:
        read = mask if valid is None else mask & valid(w)
        at = source(w)
        _record(w, at, nbytes, read)
        values = w.block.memory.load(at.astype(np.int64), nbytes, read)
        values = np.where(read, values, np.uint32(0))
        places = to(w).astype(np.int64)[mask]
        _check_shared(w, ins, places, nbytes)
        for i in range(nbytes // 4):
            w.block.shared[places // 4 + i] = values[i][mask]

    return run


# -- control -----------------------------------------------------------------------------------------------------------


def target(code: Code, token: str) -> int:
    """Return the index of the instruction that a branch goes to."""
    label = re.fullmatch(r"`\((.*)\)", token)
    address = code.labels[label[1]] if label else int(token, 16)
    return address // 16


def _branch(code: Code, ins: Instruction) -> Callable[[_Warp, int, Any, Any], Any]:
    to = target(code, ins.operands[-1])
    conditions = [_predicate(op) for op in ins.operands[:-1] if _is_predicate(op)]
    diverged = ".DIV" in ins.opcode

    def control(w: _Warp, index: int, mask: Any, active: Any) -> Any:
        taken = active
        for condition in conditions:
            taken = taken & condition(w)
        if diverged and (mask == w.live).all():
            taken = np.zeros(LANES, bool)
        if not taken.any():
            return index + 1, mask
        rest = mask & ~taken
        if not rest.any():
            return to, mask
        w.ready += [(to, taken), (index + 1, rest)]
        return None

    return control


def _return(ins: Instruction) -> Callable[[_Warp, int, Any, Any], Any]:
    get = _integer(ins.operands[0].split()[0])

    def control(w: _Warp, index: int, mask: Any, active: Any) -> Any:
        to = np.broadcast_to(get(w), LANES)
        for address in np.unique(to[active]).tolist():
            w.ready.append((int(address) // 16, active & (to == address)))
        if (mask & ~active).any():
            w.ready.append((index + 1, mask & ~active))

    return control


def _exit(w: _Warp, index: int, mask: Any, active: Any) -> Any:
    w.exit(active)
    rest = mask & ~active
    return (index + 1, rest) if rest.any() else None


def _open_barrier(ins: Instruction) -> Callable[[_Warp, int, Any, Any], Any]:
    name = ins.operands[0]

    def control(w: _Warp, index: int, mask: Any, active: Any) -> Any:
        kept = w.barriers.setdefault(name, [])
        kept[:] = [one for one in kept if not (one.members & mask).any()]
        kept.append(_Barrier(mask.copy(), np.zeros(LANES, bool)))
        return index + 1, mask

    return control


def _barrier_of(w: _Warp, name: str, mask: Any) -> _Barrier:
    found = [one for one in w.barriers.get(name, []) if (one.members & mask).any()]
    if len(found) != 1:
        raise SassError(f"{w.block.code.kernel}: {len(found)} convergence barriers {name} hold the lanes")
    return found[0]


def _wait_barrier(ins: Instruction) -> Callable[[_Warp, int, Any, Any], Any]:
    name = ins.operands[0]

    def control(w: _Warp, index: int, mask: Any, active: Any) -> Any:
        barrier = _barrier_of(w, name, mask)
        barrier.arrived |= active
        rest = mask & ~active
        if rest.any():
            w.ready.append((index + 1, rest))
        if (barrier.members & w.live & ~barrier.arrived).any():
            w.waiting = [entry for entry in w.waiting if entry[2] is not barrier]
            w.waiting.append((index + 1, barrier.arrived.copy(), barrier))
            return None
        w.waiting = [entry for entry in w.waiting if entry[2] is not barrier]
        w.barriers[name].remove(barrier)
        return index + 1, barrier.arrived & w.live

    return control


def _leave_barrier(ins: Instruction) -> Callable[[_Warp, int, Any, Any], Any]:
    name = ins.operands[-1]
    conditions = [_predicate(op) for op in ins.operands[:-1]]

    def control(w: _Warp, index: int, mask: Any, active: Any) -> Any:
        for condition in conditions:
            active = active & condition(w)
        if active.any():
            barrier = _barrier_of(w, name, active)
            barrier.members = barrier.members & ~active
            w.exit(np.zeros(LANES, bool))
        return index + 1, mask

    return control


def _nothing(w: _Warp, mask: Any) -> None:
    del w, mask


_SPECIAL_RUN: Mapping[str, Callable[[Instruction], Callable[[_Warp, Any], None]]] = {
    "SHFL": _shuffle, "VOTE": _vote, "VOTEU": _vote, "REDUX": _reduce, "LDG": _global_load, "LD": _global_load,
    "STG": _global_store, "ST": _global_store, "ATOMG": _atomic, "ATOMS": _atomic, "LDS": _shared_load,
    "STS": _shared_store, "LDGSTS": _copy_to_shared,
}  # fmt: skip


def _compile(code: Code, ins: Instruction) -> _Executable:
    guard = _predicate(ins.guard) if ins.guard else None
    name = ins.name
    control: Any = None
    run: Callable[[_Warp, Any], None] = _nothing
    if name in ("BRA", "CALL"):
        control = _branch(code, ins)
    elif name == "RET":
        control = _return(ins)
    elif name == "EXIT":
        control = _exit
    elif name == "BSSY":
        control = _open_barrier(ins)
    elif name == "BSYNC":
        control = _wait_barrier(ins)
    elif name == "BREAK":
        control = _leave_barrier(ins)
    elif name == "BAR":
        if ".SYNC" not in ins.opcode:
            raise SassError(f"an instruction that is not known: {ins}")
        control = lambda w, index, mask, active: _BARRIER  # noqa: E731
    elif name == "FCHK":
        write = _writer([ins.operands[0]])
        run = lambda w, mask: write(w, mask, (np.bool_(False),))  # noqa: E731
    elif name in _SPECIAL_RUN:
        run = _SPECIAL_RUN[name](ins)
    elif name not in _IGNORED:
        run = _computing(ins)
    return _Executable(guard, run, control, name in MARKED)


def _unknown(ins: Instruction, error: SassError) -> _Executable:
    """Fail when the instruction is executed: parts of a kernel that a launch never reaches need not be known."""

    def control(w: _Warp, index: int, mask: Any, active: Any) -> Any:
        raise SassError(f"{w.block.code.kernel}: {ins}: {error}")

    return _Executable(None, _nothing, control)


@functools.lru_cache(maxsize=64)
def _program(code: Code) -> tuple[_Executable, ...]:
    made = []
    for ins in code.instructions:
        try:
            made.append(_compile(code, ins))
        except SassError as error:
            made.append(_unknown(ins, error))
    return tuple(made)


def execute(
    code: Code, launch: Launched, block: tuple[int, int, int], memory: Memory, warps: Sequence[int] | None = None
) -> list[Trace]:
    """Execute a block, or some of its warps; return a trace of each warp.

    Args:
        code: the kernel.
        launch: the launch.
        block: the block's index.
        memory: global memory, which is changed.
        warps: the warps to execute; all by default. Shared memory that others would have written is undefined.

    Raises:
        SassError: the code does what this module does not know.
    """
    state = _Block(code, launch, block, memory)
    count = -(-launch.threads // LANES)
    made = [_Warp(state, number, _program(code)) for number in (range(count) if warps is None else warps)]
    running = [(warp, warp.run()) for warp in made]
    with np.errstate(all="ignore"):
        while running:
            running = [(warp, steps) for warp, steps in running if next(steps, _BARRIER) is None]
    return [warp.trace for warp in made]


def iterate_blocks(grid: tuple[int, int, int]) -> Iterator[tuple[int, int, int]]:
    """Return all blocks of a grid, x first."""
    for z in range(grid[2]):
        for y in range(grid[1]):
            for x in range(grid[0]):
                yield x, y, z
