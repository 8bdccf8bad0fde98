"""Reads EfficientAT's `fname_to_index.pkl`, a pickled dict of names to rows, without unpickling anything.

A pickle is a program. Of its some seventy instructions a dict of str to int needs fifteen; this reader knows those, in
the one order in which such a dict is written, and keeps no stack and no memo. So there is nothing that could call,
import or build anything, and whatever else a file holds is refused.
"""

import pickletools
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import pyarrow as pa

from pipeline.errors import ForeignLogitsError

_MAX_BYTES = 1 << 30
"""AudioSet's 1.9 million names are about 40 MB."""
_MAX_NAME_BYTES = 1024

_PROTO, _PROTOCOLS = 0x80, range(2, 6)
_EMPTY_DICT, _MARK, _SET_ITEM, _SET_ITEMS, _STOP = b"}(su."
_PASSED_OVER = {0x94: 0, ord("q"): 1, ord("r"): 4, 0x95: 8}
"""Instruction → bytes behind it: MEMOIZE, BINPUT and LONG_BINPUT note what nothing here looks up again; FRAME says how
far to read ahead."""
_TEXTS = {0x8C: 1, ord("X"): 4}
"""Bytes of the length of a SHORT_BINUNICODE and a BINUNICODE."""
_NUMBERS = {ord("K"): 1, ord("M"): 2, ord("J"): 4}
"""Bytes of a BININT1, a BININT2 and a BININT, of which only the last has a sign."""


@dataclass(frozen=True, slots=True, eq=False)
class NameIndex:
    """Which row each name stands for."""

    names: pa.StringArray
    rows: np.ndarray
    """(names,), int64, 0 or more."""


def read_name_index(path: Path) -> NameIndex:
    """Read a pickled dict of str to int.

    Raises:
        ForeignLogitsError: the file is damaged, too large, or holds anything but such a dict.
    """
    size = path.stat().st_size
    if size > _MAX_BYTES:
        raise ForeignLogitsError(f"{path}: {size:,} bytes are no index of names; at most {_MAX_BYTES:,} are read")
    reader = _Reader(path.read_bytes(), str(path))
    reader.read_dict()
    buffers = [None, pa.py_buffer(reader.ends), pa.py_buffer(reader.text)]
    names = pa.Array.from_buffers(pa.string(), len(reader.rows), buffers)
    try:
        names.validate(full=True)
    except pa.ArrowInvalid as error:
        raise ForeignLogitsError(f"{path}: a name is not UTF-8 ({error})") from error
    return NameIndex(names, np.array(reader.rows, dtype=np.int64))


class _Reader:
    """Goes through the bytes once. What it collects grows with the bytes read, never with what they claim."""

    def __init__(self, content: bytes, location: str) -> None:
        self._content = content
        self._location = location
        self._position = 0
        self.text = bytearray()
        self.ends = array("i", [0])
        self.rows = array("q")

    def read_dict(self) -> None:
        proto = self._take(2)
        if proto[0] != _PROTO or proto[1] not in _PROTOCOLS:
            raise ForeignLogitsError(f"{self._location}: is no pickle of protocol {_PROTOCOLS[0]} to {_PROTOCOLS[-1]}")
        self._expect(_EMPTY_DICT)
        while (code := self._instruction()) != _STOP:
            if code == _MARK:
                while (code := self._instruction()) != _SET_ITEMS:
                    self._item(code)
            else:
                self._item(code)
                self._expect(_SET_ITEM)
        if left := len(self._content) - self._position:
            raise ForeignLogitsError(f"{self._location}: {left} bytes follow the end of its pickle; get it again")

    def _item(self, code: int) -> None:
        width = _TEXTS.get(code) or self._refuse(code)
        length = int.from_bytes(self._take(width), "little")
        if length > _MAX_NAME_BYTES:
            raise ForeignLogitsError(
                f"{self._location}: the name at byte {self._position} claims {length:,} bytes; at most "
                f"{_MAX_NAME_BYTES:,} are a name"
            )
        self.text += self._take(length)
        self.ends.append(len(self.text))
        code = self._instruction()
        width = _NUMBERS.get(code) or self._refuse(code)
        row = int.from_bytes(self._take(width), "little", signed=width == 4)
        if row < 0:
            raise ForeignLogitsError(f"{self._location}: names row {row} at byte {self._position}; rows begin at 0")
        self.rows.append(row)

    def _instruction(self) -> int:
        """Returns the next instruction that means something here."""
        while True:
            code = self._take(1)[0]
            width = _PASSED_OVER.get(code)
            if width is None:
                return code
            self._take(width)

    def _expect(self, wanted: int) -> None:
        code = self._instruction()
        if code != wanted:
            self._refuse(code)

    def _take(self, size: int) -> bytes:
        taken = self._content[self._position : self._position + size]
        if len(taken) < size:
            raise ForeignLogitsError(
                f"{self._location}: ends at byte {len(self._content)}, in the middle; get it again"
            )
        self._position += size
        return taken

    def _refuse(self, code: int) -> NoReturn:
        known = next((instruction for instruction in pickletools.opcodes if instruction.code == chr(code)), None)
        raise ForeignLogitsError(
            f"{self._location}: has {known.name if known else f'an unknown instruction {code}'} at byte "
            f"{self._position - 1}, which no dict of names to row numbers needs. A pickle can run any program, so "
            "only such a dict is read, and nothing of this file was"
        )
