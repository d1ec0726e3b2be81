"""tokenizer.model: SentencePiece's protobuf, read and written without its library.

https://github.com/google/sentencepiece, sentencepiece_model.proto. The library itself gives away neither the flags of
its normaliser nor all pieces at once, and it must never see what it cannot check.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgelm.added_tokens import MAX_IDS
from edgelm.errors import TokenizerError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of pieces
BPE = 2  # of the trainer's model types
MAX_BYTES = 64 << 20  # Gemma's 256 000 pieces take 4 MB
_PIECE, _TRAINER, _NORMALIZER = 1, 2, 3
_MODEL_TYPE, _BYTE_FALLBACK = 3, 35  # fields of the trainer
_DUMMY_PREFIX, _EXTRA_WHITESPACE = 3, 4  # fields of the normaliser


@dataclass(frozen=True)
class PieceModel:
    """What a tokenizer.model holds.

    Attributes:
        data: the file.
        names: the pieces.
        kinds: their types.
        score_at: where the score of each piece is, if they all have the usual form: name, score, and maybe type.
        pieces_end: where the pieces end.
        trainer: the trainer's settings, as they stand there.
        model_type: `BPE`, or another one.
        byte_fallback: whether characters that have no piece become bytes.
        dummy_prefix: whether a space is put before a text.
        remove_extra_whitespace: whether spaces that follow one another become one.
    """

    data: bytes
    names: Sequence[str]
    kinds: Sequence[int]
    score_at: Sequence[int]
    pieces_end: int
    trainer: bytes
    model_type: int
    byte_fallback: bool
    dummy_prefix: bool
    remove_extra_whitespace: bool

    def plain(self) -> bytes:
        """The same pieces as transformers' BPE has them: merged in the order of their ids, no text changed before.

        Pieces that a user defined are merged like others, for they are cut out of the text as added tokens are, if at
        all.
        """
        merged = [NORMAL if kind in (USER_DEFINED, UNUSED) else kind for kind in self.kinds]
        if len(self.score_at) == len(self.names):  # nothing but the numbers changes, and nothing moves
            data = np.frombuffer(self.data, np.uint8)[: self.pieces_end].copy()
            at = np.array(self.score_at)
            data[at[:, None] + np.arange(4)] = (-np.arange(len(at), dtype="<f4")).view(np.uint8).reshape(-1, 4)
            changed = np.array(merged) != np.array(self.kinds)
            data[at[changed] + 5] = NORMAL
            pieces = data.tobytes()
        else:
            bodies = [
                _field(1, name.encode()) + b"\x15" + struct.pack("<f", -index) + bytes((0x18, kind))
                for index, (name, kind) in enumerate(zip(self.names, merged, strict=True))
            ]
            pieces = b"".join([_field(_PIECE, body) for body in bodies])
        normalizer = _field(1, b"identity") + _flag(_DUMMY_PREFIX, 0) + _flag(_EXTRA_WHITESPACE, 0)
        return pieces + _field(_TRAINER, self.trainer) + _field(_NORMALIZER, normalizer)


def _varint(value: int) -> bytes:
    result = b""
    while value > 0x7F:
        result += bytes([value & 0x7F | 0x80])
        value >>= 7
    return result + bytes([value])


def _field(number: int, value: bytes) -> bytes:
    if len(value) < 0x80:
        return bytes((number << 3 | 2, len(value))) + value
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _flag(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 64:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise ValueError("a number of more than 64 bits")


def _fields(data: bytes) -> list[tuple[int, int | bytes]]:
    """Fields of a message: number and value (fixed-width ones as bytes)."""
    position = 0
    result: list[tuple[int, int | bytes]] = []
    while position < len(data):
        key, position = _read_varint(data, position)
        kind = key & 7
        if kind == 0:
            value, position = _read_varint(data, position)
            result.append((key >> 3, value))
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"a field of wire type {kind}")
        size = {1: 8, 5: 4}.get(kind, 0)
        if kind == 2:
            size, position = _read_varint(data, position)
        if size > len(data) - position:
            raise ValueError(f"a field of {size} bytes where {len(data) - position} are left")
        result.append((key >> 3, data[position : position + size]))
        position += size
    return result


def _piece(data: bytes) -> tuple[bytes, int]:
    values = dict(_fields(data))
    name, kind = values.get(1, b""), values.get(3, NORMAL)
    if not isinstance(name, bytes) or not isinstance(kind, int):
        raise ValueError("a piece with fields of the wrong type")
    return name, kind


def _pieces(data: bytes) -> tuple[list[tuple[bytes, int]], list[int], int]:
    """The pieces that a model begins with, where the scores of the usual ones are, and where the pieces end.

    Nearly all are a short name, a score, and maybe a type: worth a shortcut where there are a quarter of a million.
    """
    result: list[tuple[bytes, int]] = []
    score_at: list[int] = []
    position = 0
    while position < len(data) and data[position] == 0x0A:
        start = position + 2
        end = start + data[position + 1]
        name_end = start + 2 + data[start + 1]
        rest = end - name_end
        short = end - start < 0x80 and data[start] == 0x0A and data[start + 1] < 0x80 and end <= len(data)
        if short and rest in (5, 7) and data[name_end] == 0x15 and (rest == 5 or data[name_end + 5] == 0x18):
            result.append((data[start + 2 : name_end], NORMAL if rest == 5 else data[name_end + 6]))
            score_at.append(name_end + 1)
            position = end
            continue
        size, start = _read_varint(data, position + 1)
        if size > len(data) - start:
            raise ValueError(f"a piece of {size} bytes where {len(data) - start} are left")
        result.append(_piece(data[start : start + size]))
        position = start + size
    return result, score_at, position


def _flags(data: bytes) -> dict[int, int]:
    return {number: value for number, value in _fields(data) if isinstance(value, int)}


def read_piece_model(path: Path) -> PieceModel:
    """Read a tokenizer.model.

    Raises:
        TokenizerError: it cannot be read, is too large, no such model, or has no pieces.
    """
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise TokenizerError(f"{path}: {size} bytes are too many for a tokenizer.model; fetch the file again")
        data = path.read_bytes()
        pieces, score_at, end = _pieces(data)
        messages = _fields(data[end:])
        pieces += [_piece(value) for number, value in messages if number == _PIECE and isinstance(value, bytes)]
        # Of a message that stands there twice protobuf takes both together.
        trainer = b"".join(v for number, v in messages if number == _TRAINER and isinstance(v, bytes))
        normalizer = b"".join(v for number, v in messages if number == _NORMALIZER and isinstance(v, bytes))
        trained, flags = _flags(trainer), _flags(normalizer)
        names = [name.decode() for name, _ in pieces]
        kinds = [kind for _, kind in pieces]
        if len(pieces) > MAX_IDS or not set(kinds) <= set(range(NORMAL, BYTE + 1)):
            raise ValueError(f"{len(pieces)} pieces, of which some have no known type")
    except (ValueError, IndexError, OSError) as error:
        reason = "it ends too early" if isinstance(error, IndexError) else error
        raise TokenizerError(f"{path}: not a usable tokenizer.model ({reason}); fetch the file again") from error
    if not pieces:
        raise TokenizerError(f"{path}: the vocabulary is empty; fetch the file again")
    return PieceModel(
        data=data,
        names=names,
        kinds=kinds,
        score_at=score_at,
        pieces_end=end,
        trainer=trainer,
        model_type=trained.get(_MODEL_TYPE, 1),
        byte_fallback=bool(trained.get(_BYTE_FALLBACK, 0)),
        dummy_prefix=bool(flags.get(_DUMMY_PREFIX, 1)),
        remove_extra_whitespace=bool(flags.get(_EXTRA_WHITESPACE, 1)),
    )
