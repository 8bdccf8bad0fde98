"""Datasets as bug reports have them become the clips and labels that were meant, or an error that says why not.

A new one is a line in `CASES`; where the reported file lies beside the checkout, in `REPORTED`.
"""

import io
import json
import os
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from encoded_sounds import by_sndfile

from pipeline import cli
from pipeline.dataset.manifest import read_manifest

REPORTED_FOLDER = Path(__file__).resolve().parents[3] / "shared" / "cases"
NAMES = {"label": {"names": ["chainsaw", "dog_bark", "rain"], "_type": "ClassLabel"}}


def tone(number: int) -> bytes:
    """A short sound; each number is another one."""
    return by_sndfile(0.3 * np.sin(0.05 * (number + 1) * np.arange(800)), 16_000)


def rows(path: Path, names: list[str | None], *, features: dict | None = None, first: int = 0, **columns: list) -> Path:
    """A Parquet file as `push_to_hub` writes it."""
    audio = [{"bytes": tone(first + row), "path": name} for row, name in enumerate(names)]
    table = pa.table({"audio": audio, **columns})
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return path


def tar_bytes(clips: dict[str, list[str]], first: int = 0) -> bytes:
    """A WebDataset tar: name → labels."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for number, (name, labels) in enumerate(clips.items()):
            described = json.dumps({"labels": labels}).encode()
            for extension, content in (("wav", tone(first + number)), ("json", described)):
                member = tarfile.TarInfo(f"{name}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def class_label(folder: Path) -> None:
    rows(folder / "a.parquet", ["0.wav", "1.wav", "2.wav"], features=NAMES, label=[0, 1, 2])


def numbers_of_no_list(folder: Path) -> None:
    rows(folder / "a.parquet", ["0.wav", "1.wav"], label=[0, 1])


def rows_without_a_path(folder: Path) -> None:
    for number in (0, 1):
        rows(folder / f"{number}.parquet", [None] * 3, features=NAMES, first=3 * number, label=[0, 1, 2])


def rows_of_one_name(folder: Path) -> None:
    rows(folder / "a.parquet", ["0.wav", "1.wav", "0.wav", "1.wav"], features=NAMES, label=[0, 0, 1, 1])


def multi_hot(folder: Path) -> None:
    vectors = [[int(place in (137, 72 + number)) for place in range(527)] for number in range(2)]
    rows(folder / "a.parquet", ["0.wav", "1.wav"], video_id=["id000000000", "id000000001"], labels=vectors)


def multi_hot_of_another_length(folder: Path) -> None:
    rows(folder / "a.parquet", ["0.wav", "1.wav"], labels=[[0, 0, 1, 0], [1, 0, 1, 0]])


def joined_tars(folder: Path) -> None:
    parts = [tar_bytes({f"clip{n}": ["Speech"], f"clip{n + 1}": ["Music"]}, n) for n in (0, 2)]
    (folder / "one.tar").write_bytes(b"".join(parts))


def a_tar_with_a_signature(folder: Path) -> None:
    (folder / "one.tar").write_bytes(tar_bytes({"clip0": ["Speech"]}) + b"-----BEGIN SIGNATURE-----" * 20)


def a_folder_in_latin_1(folder: Path) -> None:
    for name in (b"b", b"f\xe9e"):
        inside = os.fsencode(folder) + b"/" + name
        os.makedirs(inside)
        with open(inside + b"/x.wav", "wb") as stream:
            stream.write(tone(len(name)))


def a_list_from_a_spreadsheet(folder: Path) -> None:
    (folder / "segments.csv").write_text('#NAME?,30,40,"/m/09x0r"\nAAAAAAAAAA0,30,40,"/m/09x0r"\n')
    (folder / "AAAAAAAAAA0.wav").write_bytes(tone(0))


HUB, TARS = ("huggingface", "--parquet"), ("webdataset", "--tars")
Outcome = tuple[dict[str, list[str]], dict[str, int]] | str
CASES: dict[Callable[[Path], None], tuple[tuple[str, ...], Outcome]] = {
    class_label: (HUB, ({"a-*/0": ["chainsaw"], "a-*/1": ["dog_bark"], "a-*/2": ["rain"]}, {})),
    numbers_of_no_list: (HUB, "--classes"),
    rows_without_a_path: (
        HUB,
        ({f"{f}-*/row {r}": [name] for f in (0, 1) for r, name in enumerate(("chainsaw", "dog_bark", "rain"))}, {}),
    ),
    rows_of_one_name: (HUB, ({f"a-*/row {r}": [("chainsaw", "dog_bark")[r // 2]] for r in range(4)}, {})),
    multi_hot: (HUB, ({"id000000000": ["Animal", "Music"], "id000000001": ["Domestic animals, pets", "Music"]}, {})),
    multi_hot_of_another_length: (HUB, "label vector of another length"),
    joined_tars: (TARS, ({f"clip{n}": [("Speech", "Music")[n % 2]] for n in range(4)}, {})),
    a_tar_with_a_signature: (TARS, ({"clip0": ["Speech"]}, {"damaged shard": 1})),
    a_folder_in_latin_1: (("folder", "--audio"), ({"b/x": ["b"]}, {"name not in UTF-8": 1})),
    a_list_from_a_spreadsheet: (("audioset", "--segments", "segments.csv", "--audio"), "#NAME?"),
}
"""What lies in a folder → the command that ingests it; the clips' labels and how many are left out, or the error."""

REPORTED: dict[tuple[str, ...], tuple[tuple[str, ...], int, set[str]]] = {
    ("02-hf-classlabel-ints/audiofolder.parquet",): (HUB, 12, {"chainsaw", "dog_bark", "rain"}),
    ("06-concatenated-tars/d",): (TARS, 4, {"Speech"}),
    ("07-hf-rows-without-a-path/nopath.parquet", "07-hf-rows-without-a-path/nopath2.parquet"): (
        HUB,
        24,
        {"chainsaw", "dog_bark", "rain"},
    ),
    ("07-hf-rows-without-a-path/samename.parquet",): (HUB, 12, {"chainsaw", "dog_bark", "rain"}),
    ("08-multi-hot-labels/multihot.parquet",): (
        HUB,
        4,
        {"Music", "Animal", "Domestic animals, pets", "Dog", "Bark"},
    ),
}
"""Files → the command that ingests them, how many clips they hold, the classes that occur."""


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_clips_and_labels_are_those_that_were_meant(
    case: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    case(folder)
    monkeypatch.chdir(folder)
    (source, *flags), wanted = CASES[case]
    exit_code = cli.run(["ingest", source, *flags, ".", "--out", str(tmp_path / "out"), "--workers", "1"])
    said = "".join(capsys.readouterr())
    if isinstance(wanted, str):
        assert exit_code != 0
        assert wanted in said
        assert not (tmp_path / "out" / "manifest.parquet").exists()
        return
    assert exit_code == 0, said
    assert outcome(tmp_path / "out") == wanted


def outcome(dataset: Path) -> tuple[dict[str, list[str]], dict[str, int]]:
    """(id, hash taken out → names of its classes), (reason → how many)."""
    manifest = read_manifest(dataset)
    names = manifest.vocabulary.names
    found = {
        re.sub("-[0-9a-f]{8}/", "-*/", clip_id): sorted(names[label] for label in labels)
        for clip_id, labels in zip(manifest.clip_ids.to_pylist(), manifest.table["labels"].to_pylist(), strict=True)
    }
    assert len(found) == len(manifest)
    reasons = pq.read_table(dataset / "rejected.parquet")["reason"].to_pylist()
    return found, {reason: reasons.count(reason) for reason in set(reasons)}


@pytest.mark.parametrize("files", REPORTED, ids=lambda files: files[0])
def test_reported_files_lose_no_clip_and_keep_their_labels(files: tuple[str, ...], tmp_path: Path) -> None:
    paths = [str(REPORTED_FOLDER / file) for file in files]
    if not all(map(os.path.exists, paths)):
        pytest.skip(f"the reported files ../shared/cases/{files[0]} are not beside this checkout")
    (source, flag), clips, classes = REPORTED[files]
    assert cli.run(["ingest", source, flag, *paths, "--out", str(tmp_path / "out"), "--workers", "1"]) == 0
    labels, left_out = outcome(tmp_path / "out")
    assert (len(labels), set().union(*labels.values()), left_out) == (clips, classes, {})
