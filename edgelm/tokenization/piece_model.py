"""Read and write tokenizer.model, SentencePiece's protobuf, without its library.

Format: https://github.com/google/sentencepiece, sentencepiece_model.proto. The library exposes neither the flags of its
normaliser nor all pieces at once. A file is also checked here before the library reads it, since the library does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import TokenizerError
from edgelm.json_dataclass import ErrorFactory, read_bytes
from edgelm.tokenization.added_tokens import MAX_IDS

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of pieces
UNIGRAM, BPE = 1, 2  # of the trainer's model types
MAX_BYTES = 64 << 20  # Gemma's 256 000 pieces take 4 MB
_PIECE, _TRAINER, _NORMALIZER = 1, 2, 3
_MODEL_TYPE = 3  # field of the trainer
_DUMMY_PREFIX, _EXTRA_WHITESPACE = 3, 4  # fields of the normaliser


@dataclass(frozen=True)
class PieceModel:
    """Contents of a tokenizer.model.

    Attributes:
        data: the file's bytes.
        text: bytes that contain the names of the pieces.
        starts: offset in `text` where each name begins, [pieces].
        ends: offset where it ends, [pieces].
        kinds: types of the pieces, [pieces].
        score_at: offset of each score in `data`, [pieces]; None unless all pieces have the usual form: name, score, and
            optionally type.
        pieces_end: offset in `data` where the pieces end, if they have that form.
        trainer: the trainer's settings, as stored.
        model_type: `BPE` or another type.
        dummy_prefix: whether a space is prepended to a text.
        remove_extra_whitespace: whether consecutive spaces become one.
    """

    data: bytes
    text: bytes
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    kinds: NDArray[np.uint8]
    score_at: NDArray[np.int64] | None
    pieces_end: int
    trainer: bytes
    model_type: int
    dummy_prefix: bool
    remove_extra_whitespace: bool

    def __len__(self) -> int:
        return len(self.kinds)

    def name(self, index: int) -> str:
        """Return the piece of an id."""
        return self.text[self.starts[index] : self.ends[index]].decode()

    def of_kind(self, *kinds: int) -> list[int]:
        """Return the ids of the pieces of these types, in order."""
        found: list[int] = np.flatnonzero(np.isin(self.kinds, kinds)).tolist()
        return found

    def plain(self) -> bytes:
        """Return a model with the same pieces that works like transformers' BPE: merges by id, no normalisation.

        User-defined pieces are merged like others; if they are to be split off, the caller does that as for added
        tokens.
        """
        changed = np.isin(self.kinds, (USER_DEFINED, UNUSED))
        scores = -np.arange(len(self), dtype="<f4")
        if self.score_at is not None:  # only numbers change: overwrite them in place
            data = np.frombuffer(self.data, np.uint8)[: self.pieces_end].copy()
            data[self.score_at[:, None] + np.arange(4)] = scores.view(np.uint8).reshape(-1, 4)
            data[self.score_at[changed] + 5] = NORMAL
            pieces = data.tobytes()
        else:
            kinds = np.where(changed, NORMAL, self.kinds).tolist()
            bodies = [
                _field(1, self.name(i).encode()) + b"\x15" + scores[i].tobytes() + bytes((0x18, kind))
                for i, kind in enumerate(kinds)
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
    """Return the fields of a message: number and value (fixed-width ones as bytes)."""
    position = 0
    result: list[tuple[int, int | bytes]] = []
    while position < len(data):
        if len(result) > MAX_IDS:
            raise ValueError(f"more than {MAX_IDS} fields")
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


_Pieces = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint8], NDArray[np.int64]]


def _usual_pieces(data: bytes) -> tuple[_Pieces | None, int]:
    """Return the pieces at the beginning of a model (starts, ends, kinds, offsets of scores), and where they end.

    None unless each is a short name, a score, and optionally a type. There may be a quarter of a million pieces, so
    only their lengths are read in a loop.
    """
    places = []
    position, size = 0, len(data)
    while position + 1 < size and data[position] == 0x0A:
        places.append(position)
        if len(places) > MAX_IDS:
            raise ValueError(f"more than {MAX_IDS} pieces")
        position += 2 + data[position + 1]
    if not places or position > size:
        return None, 0
    view = np.frombuffer(data + bytes(16), np.uint8)  # padded, so that every index below is inside
    at = np.array(places)
    length, name_length = view[at + 1].astype(np.int64), view[at + 3].astype(np.int64)
    ends = at + 4 + name_length
    rest = length - 2 - name_length
    if not (length < 0x80).all() or not (view[at + 2] == 0x0A).all() or not np.isin(rest, (5, 7)).all():
        return None, 0
    typed = rest == 7
    if not (view[ends] == 0x15).all() or not (view[ends[typed] + 5] == 0x18).all():
        return None, 0
    kinds = np.where(typed, view[ends + 6 * typed], NORMAL).astype(np.uint8)
    return (at + 4, ends, kinds, ends + 1), position


def _check_names(text: bytes, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> None:
    """Check that every name is UTF-8: all names joined are, and none begins inside a character."""
    steps = np.zeros(len(text) + 1, np.int8)
    steps[starts] += 1
    steps[ends] -= 1
    view = np.frombuffer(text, np.uint8)
    view[np.cumsum(steps[:-1]) > 0].tobytes().decode()
    if (view[starts[ends > starts]] & 0xC0 == 0x80).any():
        raise ValueError("a piece that begins within a character")


def _flags(data: bytes) -> dict[int, int]:
    return {number: value for number, value in _fields(data) if isinstance(value, int)}


def read_piece_model(path: Path) -> PieceModel:
    """Read a tokenizer.model.

    Raises:
        TokenizerError: the file cannot be read, is too large, is not such a model, or has no pieces.
    """
    data = read_bytes(path, ErrorFactory(TokenizerError, "fetch the file again"), MAX_BYTES)
    try:
        usual, end = _usual_pieces(data)
        messages = _fields(data[end:])
        others = [_piece(value) for number, value in messages if number == _PIECE and isinstance(value, bytes)]
        text, score_at = data, None
        if usual is not None and not others:
            starts, ends, kinds, score_at = usual
        else:
            if usual is not None:
                others = [_piece(v) for number, v in _fields(data) if number == _PIECE and isinstance(v, bytes)]
            text = b"".join(name for name, _ in others)
            lengths = np.array([len(name) for name, _ in others], np.int64)
            ends = np.cumsum(lengths)
            starts = ends - lengths
            kinds = np.array([min(kind, 255) for _, kind in others], np.uint8)
        if not len(kinds):
            raise ValueError("the vocabulary is empty")
        _check_names(text, starts, ends)
        # In protobuf, a message that occurs twice is merged.
        trainer = b"".join(v for number, v in messages if number == _TRAINER and isinstance(v, bytes))
        normalizer = b"".join(v for number, v in messages if number == _NORMALIZER and isinstance(v, bytes))
        trained, flags = _flags(trainer), _flags(normalizer)
        if len(kinds) > MAX_IDS or not np.isin(kinds, range(NORMAL, BYTE + 1)).all():
            raise ValueError(f"{len(kinds)} pieces, of which some have no known type")
    except (ValueError, IndexError) as error:
        reason = "it ends too early" if isinstance(error, IndexError) else error
        raise TokenizerError(f"{path}: not a usable tokenizer.model ({reason}); fetch the file again") from error
    return PieceModel(
        data=data,
        text=text,
        starts=starts,
        ends=ends,
        kinds=kinds,
        score_at=score_at,
        pieces_end=end,
        trainer=trainer,
        model_type=trained.get(_MODEL_TYPE, 1),
        dummy_prefix=bool(flags.get(_DUMMY_PREFIX, 1)),
        remove_extra_whitespace=bool(flags.get(_EXTRA_WHITESPACE, 1)),
    )
