"""Disassembles a cubin with NVIDIA's nvdisasm, and executes the machine code (SASS) of a launch's blocks on the CPU.

`execute` counts the instructions that warps issue; it is not a test of results. Integers, predicates, branches, shared
and global memory are exact, since they decide which instructions are executed. Products of tensor cores and conversions
between float formats are replaced by a constant (see `floats.py`). An instruction that is not known is an error where
it is executed, so a count is never made of guesses.

NVIDIA documents SASS by the names of its instructions only (CUDA Binary Utilities, "Instruction Set Reference"). What
they compute was inferred from compiled code; `test_sass.py` compares integer functions with Python's arithmetic.
"""

from sass.code import Code, Instruction, SassError, disassemble, nvdisasm, target
from sass.execute import execute, iterate_blocks
from sass.memory import DEFAULT_WORD, Memory
from sass.state import Launched, Trace

__all__ = [
    "DEFAULT_WORD",
    "Code",
    "Instruction",
    "Launched",
    "Memory",
    "SassError",
    "Trace",
    "disassemble",
    "execute",
    "iterate_blocks",
    "nvdisasm",
    "target",
]
