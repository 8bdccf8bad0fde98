"""Embeddings are read again as stores of logits are: what is wrong is found, and moved out of the way of `embed`."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import cli
from pipeline.commands.verify_path import VerifyConfig, run
from pipeline.dataset.manifest import Manifest, read_manifest
from pipeline.embeddings.store import (
    STAMP_NAME,
    EmbeddingStamp,
    claim,
    open_embeddings,
    publish_part,
    read_stamp,
    write_failures,
)
from pipeline.errors import PipelineError, VerificationError
from pipeline.logits.store import ClipFailure

STAMP = EmbeddingStamp(
    model="mn01", sha256="a" * 64, front_end="log-mel", layers="penultimate", size=3, precision="float32"
)


@pytest.fixture
def data(build_dataset: Callable[..., Manifest], make_noises: Callable) -> Manifest:
    return build_dataset("data", make_noises(12, 5))


@pytest.fixture
def embedded(data: Manifest, tmp_path: Path) -> Path:
    """Embeddings of three shards; the first clip could not be decoded."""
    out = str(tmp_path / "out")
    claim(out, STAMP, overwrite=False)
    for shard in data.shards:
        ids = [data.clip_id(row) for row in data.rows_of_shard(shard)]
        failed = [ClipFailure(clip_id=ids.pop(0), reason="no sound")] if shard == data.shards[0] else []
        values = np.ones((len(ids), STAMP.size), np.float16)
        publish_part(out, shard, ids, values, STAMP, data.shard_identity(shard), failed)
    write_failures(out, open_embeddings(out)[1])
    return Path(out)


def faults(folder: Path, **settings: Any) -> list[tuple[str, str, str | None]]:
    try:
        found = run(VerifyConfig(str(folder), out=str(folder.parent / "faults.parquet"), workers=1, **settings))
        return [(fault.check, fault.file, fault.clip_id) for fault in found.faults]
    except VerificationError:
        rows = pq.read_table(folder.parent / "faults.parquet").to_pylist()
        return [(row["check"], row["file"], row["clip_id"]) for row in rows]


def test_sound_embeddings_cover_their_dataset_but_for_what_failed(embedded: Path, data: Manifest) -> None:
    found = run(VerifyConfig(str(embedded), data=data.location, workers=2))
    assert found.looked_at == {"parts": 3, "clips": 11}
    assert (found.faults, +found.notes) == ([], {"clips that could not be embedded": 1})


def test_bad_parts_are_moved_out_of_the_way_of_the_command_that_makes_them_again(
    embedded: Path, data: Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, third = (embedded / shard.replace(".tar", ".parquet") for shard in data.shards)
    first.write_bytes(first.read_bytes()[:-9])
    twice = np.array([[1, np.nan, 1], [1, 1, 1]], np.float16)
    publish_part(str(embedded), data.shards[1], ["x", "x"], twice, replace(STAMP, precision="bfloat16"), "", [])
    pq.write_table(pq.read_table(third).rename_columns(["clip_id", "vector"]), third)
    found = faults(embedded, data=data.location)
    assert found[:5] == [
        ("damaged part", first.name, None),
        ("repeated clip id", second.name, "x"),
        ("embeddings that are not finite", second.name, "x"),
        ("part made otherwise", second.name, None),
        ("damaged part", third.name, None),
    ]
    assert found[5:] == [("clips without embeddings", shard, None) for shard in data.shards]
    assert cli.run(["verify", str(embedded), "--repair"]) == 0
    assert "pipeline embed" in capsys.readouterr().out
    assert sorted(path.name for path in (embedded / ".damaged").iterdir()) == [first.name, second.name, third.name]
    assert [path.name for path in embedded.glob("*.parquet")] == ["failed.parquet"]


@pytest.mark.parametrize("content", [None, b"{}"])
def test_a_stamp_is_written_again_from_parts_that_agree(embedded: Path, content: bytes | None) -> None:
    (embedded / STAMP_NAME).unlink()
    if content is not None:
        (embedded / STAMP_NAME).write_bytes(content)
    assert faults(embedded) == [("unusable stamp", STAMP_NAME, None)]
    assert cli.run(["verify", str(embedded), "--repair"]) == 0
    assert read_stamp(str(embedded)) == STAMP


def test_the_list_of_failures_is_written_again(embedded: Path) -> None:
    before = (embedded / "failed.parquet").read_bytes()
    (embedded / "failed.parquet").write_bytes(b"no Parquet")
    assert faults(embedded) == [("list of failed clips disagrees", "failed.parquet", None)]
    assert cli.run(["verify", str(embedded), "--repair"]) == 0
    assert (embedded / "failed.parquet").read_bytes() == before


def test_a_shard_that_changed_since_is_told(embedded: Path, data: Manifest) -> None:
    table = pq.read_table(Path(data.location, "manifest.parquet"))
    first, *others = table.to_pylist()
    changed = pa.Table.from_pylist([first | {"crc32": 7}, *others], schema=table.schema)
    pq.write_table(changed, Path(data.location, "manifest.parquet"))
    assert read_manifest(data.location).shard_identity(data.shards[0]) != data.shard_identity(data.shards[0])
    assert faults(embedded, data=data.location) == [("shard changed since", data.shards[0], None)]


def test_inspect_says_what_made_them_and_what_they_cover(
    embedded: Path, data: Manifest, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    (embedded / data.shards[2].replace(".tar", ".parquet")).unlink()
    assert cli.run(["inspect", str(embedded), "--data", data.location]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for words in (
        "penultimate, 3 numbers a clip in float16, computed in float32",
        f"mn01 weights sha256 {'a' * 64}",
        "without embedding 1 clips: no sound 1",
        "clips with embeddings 9 of 12 (75.0 %)",
        f"{data.shards[2]} (2 clips)",
    ):
        assert words in text


def test_what_a_damaged_part_is_ends_reading_in_one_line(embedded: Path, data: Manifest) -> None:
    part = embedded / data.shards[0].replace(".tar", ".parquet")
    part.write_bytes(part.read_bytes()[:-9])
    with pytest.raises(PipelineError, match=rf"{part.name}: no part of a store of embeddings \("):
        open_embeddings(str(embedded))
