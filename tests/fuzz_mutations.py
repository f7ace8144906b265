"""Inputs made of valid files: pieces changed, cut, doubled, swapped or replaced, and checksums made right."""

from __future__ import annotations

import random
import struct
import tarfile
import zlib
from collections.abc import Callable, Sequence

NUMBERS = (0, 1, 2, 7, 8, 16, 127, 128, 255, 256, 511, 512, 32767, 32768, 65535, 2**31 - 1, 2**31, 2**32 - 1)
PNG = b"\x89PNG\r\n\x1a\n"


def mutated(chance: random.Random, seeds: Sequence[bytes], words: Sequence[bytes]) -> bytes:
    """One of the seeds with one to eight changes; half of them with right checksums.

    ``chance`` decides everything; any object with the methods of :class:`random.Random` will do.
    """
    data = bytearray(chance.choice(seeds))
    for _ in range(chance.randint(1, 8)):
        change: Callable[..., None] = chance.choice(CHANGES)
        change(chance, data, seeds, words)
    return repaired(bytes(data)) if chance.randint(0, 1) else bytes(data)


def _place(chance: random.Random, data: bytearray) -> int:
    return chance.randint(0, len(data))


def _piece(chance: random.Random, data: bytes) -> slice:
    start = chance.randint(0, len(data))
    return slice(start, start + chance.choice((1, 1, 2, 4, 16, 64, 512, 4096)))


def _flip(chance: random.Random, data: bytearray, *_: object) -> None:
    if data:
        data[_place(chance, data) - 1] ^= 1 << chance.randint(0, 7)


def _byte(chance: random.Random, data: bytearray, *_: object) -> None:
    if data:
        data[_place(chance, data) - 1] = chance.randint(0, 255)


def _number(chance: random.Random, data: bytearray, *_: object) -> None:
    value, size, order = chance.choice(NUMBERS), chance.choice((1, 2, 4, 8)), chance.choice(("little", "big"))
    at = _place(chance, data)
    data[at : at + size] = (value % 256**size).to_bytes(size, order)


def _digits(chance: random.Random, data: bytearray, *_: object) -> None:
    """A number in decimal or octal digits, as texts and tars have it."""
    at = _place(chance, data)
    number = chance.choice((*NUMBERS, -1, 2**63, 10**30))
    text = str(number) if chance.randint(0, 1) else f"{number:o}"
    data[at : at + chance.choice((0, len(text)))] = text.encode()


def _cut(chance: random.Random, data: bytearray, *_: object) -> None:
    del data[_piece(chance, data)]


def _end(chance: random.Random, data: bytearray, *_: object) -> None:
    del data[_place(chance, data) :]


def _double(chance: random.Random, data: bytearray, *_: object) -> None:
    piece = bytes(data[_piece(chance, data)])
    at = _place(chance, data)
    data[at:at] = piece * chance.choice((1, 1, 2, 50))


def _other(chance: random.Random, data: bytearray, seeds: Sequence[bytes], *_: object) -> None:
    other = chance.choice(seeds)
    at = _place(chance, data)
    data[at : at + chance.choice((0, 4, 64))] = other[_piece(chance, other)]


def _word(chance: random.Random, data: bytearray, _: object, words: Sequence[bytes]) -> None:
    at = _place(chance, data)
    word = chance.choice(words)
    data[at : at + chance.choice((0, 0, len(word)))] = word


def _line(chance: random.Random, data: bytearray, *_: object) -> None:
    """A whole line moved, for texts."""
    lines = bytes(data).split(b"\n")
    line = lines.pop(chance.randint(0, len(lines) - 1))
    lines.insert(chance.randint(0, len(lines)), line)
    data[:] = b"\n".join(lines)


CHANGES = (_flip, _byte, _number, _digits, _cut, _end, _double, _other, _word, _word, _line)


def repaired(data: bytes) -> bytes:
    """The same with every checksum right of what looks like a PNG chunk or a tar header."""
    if data.startswith(PNG):
        return _right_chunks(data)
    if len(data) > 512 and data[257:262] == b"ustar":
        return _right_headers(data)
    return data


def _right_chunks(data: bytes) -> bytes:
    result, at = bytearray(data), len(PNG)
    while at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        end = at + 8 + size
        if end + 4 > len(data):
            break
        result[end : end + 4] = struct.pack(">I", zlib.crc32(data[at + 4 : end]))
        at = end + 4
    return bytes(result)


def _right_headers(data: bytes) -> bytes:
    result = bytearray(data)
    for at in range(0, len(data) - 511, 512):
        block = bytes(data[at : at + 512])
        if block[257:262] == b"ustar":
            result[at + 148 : at + 156] = b"%06o\0 " % tarfile.calc_chksums(block)[0]  # type: ignore[attr-defined]
    return bytes(result)
