"""Does what only Windows needs work, as far as another system can tell?"""

from __future__ import annotations

import os
import struct
import threading
from pathlib import Path

import numpy as np
import pytest

from edgelm.export.packing import contents
from edgelm.export.packing.weights_file import Slot, SlotWriter
from edgelm.system import windows


def core(*masks: tuple[int, int], kind: int = 0) -> bytes:
    """Return an entry of GetLogicalProcessorInformationEx, with masks of (bits, group)."""
    groups = b"".join(struct.pack("<QH6x", bits, group) for bits, group in masks)
    head = struct.pack("<IIBB20xH", kind, 32 + len(groups), 1, 0, len(masks))
    return head + groups


def test_cores_and_their_threads_are_read_from_the_systems_answer() -> None:
    answer = core((0b11, 0)) + core((1, 0), kind=2) + core((0b100, 0)) + core((1 << 63, 1))
    assert windows.cores_in(answer) == [{0, 1}, {2}, {127}]


@pytest.mark.parametrize("rest", [b"", core((1, 0))[:31], bytes(64)])
def test_what_is_no_whole_entry_ends_the_list(rest: bytes) -> None:
    assert windows.cores_in(core((0b11, 0)) + rest) == [{0, 1}]


def test_tensors_are_written_in_their_places_where_the_system_has_no_pwrite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "pwrite")
    dtype, lock = np.dtype(np.uint8), threading.Lock()
    slots = [Slot(str(i), (4,), dtype, 4 * i, 4, None, contents.array((4,), dtype)) for i in range(3)]
    file = tmp_path / "weights"
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT)
    try:
        writers = [SlotWriter(slot, descriptor, lock) for slot in slots]
        for part in range(2):
            for i in (2, 0, 1):
                writers[i].append(np.full(2, 10 * i + part, np.uint8))
    finally:
        os.close(descriptor)
    assert file.read_bytes() == bytes([0, 0, 1, 1, 10, 10, 11, 11, 20, 20, 21, 21])
