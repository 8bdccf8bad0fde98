import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ForeignLogitsError
from pipeline.logits.imports.name_index import NameIndex, read_name_index


def read(folder: Path, content: bytes) -> NameIndex:
    path = folder / "fname_to_index.pkl"
    path.write_bytes(content)
    return read_name_index(path)


def as_dict(index: NameIndex) -> dict[str, int]:
    return dict(zip(index.names.to_pylist(), index.rows.tolist(), strict=True))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("count", [0, 1, 2, 3000])
def test_a_dict_of_names_to_rows_comes_back(tmp_path: Path, protocol: int, count: int) -> None:
    wanted = {f"{row:011}": row * 777 for row in range(count)}  # one, two and four bytes a number, and many frames
    assert as_dict(read(tmp_path, pickle.dumps(wanted, protocol))) == wanted


@pytest.mark.parametrize("protocol", [2, 4])
def test_names_of_any_script_and_length_come_back(tmp_path: Path, protocol: int) -> None:
    wanted = {"": 0, "ö" * 300: 1, "音": 2**31 - 1}
    assert as_dict(read(tmp_path, pickle.dumps(wanted, protocol))) == wanted


class _Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch it-ran",)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (pickle.dumps(_Hostile(), 2), "GLOBAL"),
        (pickle.dumps(_Hostile(), 4), "no dict of names"),
        (pickle.dumps({"a": _Hostile()}, 2), "GLOBAL"),
        (pickle.dumps({"a": _Hostile()}, 4), "SHORT_BINUNICODE"),
        (pickle.dumps({_Hostile(): 1}, 2), "GLOBAL"),
        (pickle.dumps({"a": {"b": 1}}, 4), "EMPTY_DICT"),
        (pickle.dumps({"a": "b"}, 4), "SHORT_BINUNICODE"),
        (pickle.dumps({"a": np.int64(3)}, 2), "GLOBAL"),
        (pickle.dumps({"a": 2**40}, 4), "LONG1"),
        (pickle.dumps({"a": True}, 4), "NEWTRUE"),
        (pickle.dumps({"a": 1.0}, 4), "BINFLOAT"),
        (pickle.dumps({"a": None}, 4), "NONE"),
        (pickle.dumps({b"a": 1}, 4), "SHORT_BINBYTES"),
        (pickle.dumps({1: 1}, 4), "BININT1"),
        (pickle.dumps({"a": -1}, 4), "row -1"),
        (pickle.dumps([("a", 1)], 4), "EMPTY_LIST"),
        (pickle.dumps({"a": 1}, 0), "protocol 2 to 5"),
        (pickle.dumps({"a": 1}, 1), "protocol 2 to 5"),
        (b"\x80\x06}.", "protocol 2 to 5"),
        (b"\x80\x04}h\x00.", "BINGET"),  # the dict as a member of itself
        (b"\x80\x04}\x94\x8c\x01a\x94h\x00s.", "BINGET"),
        (b"\x80\x04}2s.", "DUP"),
        (b"\x80\x04}\xff.", "unknown instruction 255"),
        (b"\x80\x04}(\x8c\x01a.", "STOP"),
        (b"\x80\x04}u.", "SETITEMS"),
        (b"\x80\x04}((u.", "MARK"),
        (b"\x80\x04}X\xff\xff\xff\xffa", "claims 4,294,967,295 bytes"),
        (b"\x80\x04}\x8d" + struct.pack("<Q", 2**60), "BINUNICODE8"),
        (b"\x80\x04}\x8c\x02\xff\xfeK\x01s.", "UTF-8"),
        (b"\x80\x04}.}.", "2 bytes follow"),
        (b"", "in the middle"),
        (b"\x80\x04\x95" + struct.pack("<Q", 2**63), "in the middle"),
    ],
)
def test_what_is_no_such_dict_is_refused_and_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ForeignLogitsError, match=told):
        read(tmp_path, content)
    assert not (tmp_path / "it-ran").exists()


def test_every_cut_is_told(tmp_path: Path) -> None:
    whole = pickle.dumps({"abc": 1, "de": 70_000}, 4)
    for length in range(len(whole)):
        with pytest.raises(ForeignLogitsError, match="in the middle"):
            read(tmp_path, whole[:length])


def test_a_file_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "fname_to_index.pkl"
    with path.open("wb") as stream:
        stream.truncate(5 << 30)
    with pytest.raises(ForeignLogitsError, match="no index of names"):
        read_name_index(path)


_INSTRUCTIONS = b"} ( u s . \x94 q\x00 r\0\0\0\0 K\x01 M\x01\x01 J\xff\xff\xff\xff \x8c\x01a R b h\x00 \x81 \x93 \xff"
_PIECES = st.sampled_from([*_INSTRUCTIONS.split(b" "), b"\x95" + bytes(8), b"X\x01\0\0\0b", b"cos\nsystem\n"])


@given(
    st.one_of(st.binary(max_size=60), st.lists(_PIECES, max_size=12).map(lambda some: b"\x80\x04}" + b"".join(some)))
)
def test_any_bytes_give_a_dict_or_one_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.pkl"
    path.write_bytes(content)
    try:
        found = as_dict(read_name_index(path))
    except ForeignLogitsError:
        return
    try:
        wanted = pickle.loads(content)  # safe: only notes, texts and numbers were accepted
    except Exception:  # a note of nothing, which means nothing here
        return
    assert found == wanted
