import io

import pytest

from pipeline.dataset.text_lists import TableError, is_error_value, is_text, read_table, spreadsheet_damage

ROWS = [["index", "mid", "display_name"], ["0", "/m/1", 'Bell, "small"'], ["1", "/m/2", "Größe"]]
PLAIN = 'index,mid,display_name\n0,/m/1,"Bell, ""small"""\n1,/m/2,Größe\n'


def read(content: bytes, delimiter: str | None = None) -> list[tuple[int, list[str]]]:
    return list(read_table(io.BytesIO(content), {"index", "mid"}, delimiter, skip_spaces=False))


@pytest.mark.parametrize(
    "content",
    [
        PLAIN.encode(),
        b"\xef\xbb\xbf" + PLAIN.replace("\n", "\r\n").encode(),
        PLAIN.replace("\n", "\r").encode(),
        PLAIN.replace(",", ";").replace("Bell;", "Bell,").encode(),
        PLAIN.replace(",", "\t").replace("Bell\t", "Bell,").encode("utf-16"),
        b"\xfe\xff" + PLAIN.encode("utf-16-be"),
        PLAIN.rstrip("\n").encode(),
        (PLAIN + "\n\r\n,,\n").encode(),
    ],
    ids=["plain", "BOM and CRLF", "CR", "semicolons", "tabs in UTF-16", "UTF-16 BE", "no last line end", "empty rows"],
)
def test_a_table_is_the_same_in_whatever_a_program_saved_it(content: bytes) -> None:
    assert [row for _, row in read(content)] == ROWS


def test_excels_own_first_line_names_the_delimiter() -> None:
    assert read(b"sep=|\r\nindex|mid\r\n0|a\r\n") == [(2, ["index", "mid"]), (3, ["0", "a"])]
    assert read(b"index|mid\n0|a\n", "|") == [(1, ["index", "mid"]), (2, ["0", "a"])]


def test_what_is_no_table_is_told_with_its_line() -> None:
    with pytest.raises(TableError) as raised:
        read(b'index,mid\n0,"a\n')
    assert raised.value.line == 2


def test_bytes_that_are_no_text_spoil_their_own_line() -> None:
    rows = read(b"index,mid\n0,caf\xe9\n1,tea\n")
    assert [is_text(row) for _, row in rows] == [True, False, True]


@pytest.mark.parametrize(
    "text",
    ["#NAME?", "#REF!", "#VALUE!", "#DIV/0!", "#N/A", "#NUM!", "#NULL!", "#SPILL!", "#BEZUG!", "#¿NOMBRE?", "#NV"],
)
def test_an_errors_name_is_known_in_every_language(text: str) -> None:
    assert is_error_value(text)
    assert spreadsheet_damage(text)


@pytest.mark.parametrize(
    "text", ["=-BBBBBBBBBB", '="-BBBBBBBBBB"', "=AAAAAAAAAA0", "1.23E+11", "1,2E+11", "-4E-05", "5E+10"]
)
def test_what_a_spreadsheet_makes_of_an_id_is_known(text: str) -> None:
    assert spreadsheet_damage(text)


@pytest.mark.parametrize(
    "text", ["", "-BBBBBBBBBB", "--PJHxphWEs", "12345678E10", "1234567E-10", "#1", "#", "=", "a=b", "12", "1.5", "##"]
)
def test_ids_and_names_that_only_look_odd_are_left_alone(text: str) -> None:
    assert not spreadsheet_damage(text)
