"""Reads the resources of compiled kernels (registers, stack, shared memory) from a cubin, without the CUDA toolkit.

A cubin is a little-endian ELF64 file. `.text.NAME` is a kernel's code; `.nv.info` holds records about all kernels,
`.nv.info.NAME` about one. A record is (format byte, attribute byte, 16 bits). Depending on the format, the 16 bits are
its value or the length of the value that follows. NVIDIA does not document this. The numbers below are those for which
`cuobjdump` and `ptxas -v` print the same values; a test compares them with the compiler's own report.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from edgelm.errors import BundleError
from edgelm.json_dataclass import Count

__all__ = ["Resources", "architecture", "resources"]

_SIZED = 4  # record format: the value follows
_FRAME, _STACK, _REGISTERS, _ARGUMENTS = 0x11, 0x12, 0x2F, 0x0A
_NOBITS = 8
# From SM 90 on the first kilobyte of a block's shared memory is reserved by the system, but counted in the section.
_RESERVED_SHARED, _FIRST_WITH_RESERVED = 1024, 90


@dataclass(frozen=True)
class Resources:
    """Resources of one kernel.

    Attributes:
        registers: 32-bit registers per thread.
        local_bytes: bytes of a thread's stack, in slow memory, for spilled registers and arrays that are indexed at run
        time.
            Our kernels must have none.
        shared_bytes: bytes of static shared memory per block.
        argument_bytes: bytes of the kernel's parameters.
    """

    registers: Count
    local_bytes: Count
    shared_bytes: Count
    argument_bytes: Count


@dataclass(frozen=True)
class _Section:
    name: str
    kind: int
    offset: int
    size: int
    link: int
    info: int


def architecture(image: bytes) -> int:
    """Return the SM that a cubin was compiled for, e.g. 86.

    Raises:
        BundleError: `image` is not a cubin.
    """
    _check(image)
    (flags,) = struct.unpack_from("<I", image, 48)
    # The lowest byte up to ELF ABI version 7 (CUDA 12), the second byte from 8 (CUDA 13) on.
    return int(flags >> 8 & 0xFF if image[8] >= 8 else flags & 0xFF)


def resources(image: bytes) -> dict[str, Resources]:
    """Return the resources of each kernel of a cubin, by name.

    Raises:
        BundleError: `image` is not a cubin, or is damaged.
    """
    _check(image)
    try:
        return _resources(image)
    except (struct.error, IndexError, KeyError, ValueError) as error:
        raise BundleError(f"a damaged cubin ({len(image)} bytes): {error}") from error


def _resources(image: bytes) -> dict[str, Resources]:
    sections = _sections(image)
    by_name = {section.name: section for section in sections}
    code = {name.removeprefix(".text."): s for name, s in by_name.items() if name.startswith(".text.")}
    symbols = _symbols(image, by_name[".symtab"], sections)
    # _FRAME is of a kernel alone, _STACK includes the functions that it calls.
    numbers: dict[int, dict[str, int]] = {_FRAME: {}, _STACK: {}, _REGISTERS: {}}
    for attribute, value in _records(image, by_name[".nv.info"]):
        if attribute in numbers:
            symbol, number = struct.unpack("<II", value)
            numbers[attribute][symbols[symbol]] = number
    reserved = _RESERVED_SHARED if architecture(image) >= _FIRST_WITH_RESERVED else 0
    found = {}
    for name, section in code.items():
        own = by_name.get(f".nv.info.{name}")
        if own is None:  # a function that kernels call
            continue
        arguments = [struct.unpack("<IHH", v)[2] for a, v in _records(image, own) if a == _ARGUMENTS]
        shared = by_name.get(f".nv.shared.{name}")
        found[name] = Resources(
            # CUDA 11 wrote the number of registers only into the top byte of the section's info.
            registers=numbers[_REGISTERS].get(name, section.info >> 24),
            local_bytes=max(numbers[_FRAME].get(name, 0), numbers[_STACK].get(name, 0)),
            shared_bytes=max(0, shared.size - reserved) if shared is not None else 0,
            argument_bytes=arguments[0] if arguments else 0,
        )
    return found


def _check(image: bytes) -> None:
    # ELF, 64 bits, little-endian; machine 190 is CUDA.
    if len(image) < 64 or image[:6] != b"\x7fELF\x02\x01" or struct.unpack_from("<H", image, 18)[0] != 190:
        raise BundleError(f"not a cubin: {image[:16]!r}")


def _sections(image: bytes) -> list[_Section]:
    (start,) = struct.unpack_from("<Q", image, 40)
    entry, count, names = struct.unpack_from("<HHH", image, 58)
    headers = [struct.unpack_from("<IIQQQQIIQQ", image, start + index * entry) for index in range(count)]
    strings = headers[names][4]
    found = [
        _Section(_string(image, strings + name), kind, offset, size, link, info)
        for name, kind, _, _, offset, size, link, info, _, _ in headers
    ]
    for section in found:
        if section.kind != _NOBITS and section.offset + section.size > len(image):
            raise ValueError(f"section {section.name} ends after the file")
    return found


def _symbols(image: bytes, table: _Section, sections: list[_Section]) -> list[str]:
    strings = sections[table.link].offset
    return [
        _string(image, strings + struct.unpack_from("<I", image, at)[0])
        for at in range(table.offset, table.offset + table.size, 24)
    ]


def _records(image: bytes, section: _Section) -> Iterator[tuple[int, bytes]]:
    at, end = section.offset, section.offset + section.size
    while at + 4 <= end:
        form, attribute, length = struct.unpack_from("<BBH", image, at)
        at += 4
        if form == _SIZED:
            yield attribute, image[at : at + length]
            at += length
        else:
            yield attribute, struct.pack("<H", length)


def _string(image: bytes, start: int) -> str:
    return image[start : image.index(0, start)].decode()
