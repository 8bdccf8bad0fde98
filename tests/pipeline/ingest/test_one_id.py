"""One clip, in every copy of AudioSet that people hold, is the same clip."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from published_copies import (
    RealClip,
    write_files,
    write_hugging_face_parquet,
    write_labelless_tar,
    write_panns_hdf5,
    write_passt_hdf5,
    write_segments,
    write_tar,
    write_webdataset,
)

from pipeline.commands import ingest_audioset as audioset
from pipeline.commands import ingest_csv as own_csv
from pipeline.commands import ingest_folder as folder
from pipeline.commands import ingest_huggingface as huggingface
from pipeline.commands import ingest_panns as panns
from pipeline.commands import ingest_passt as passt
from pipeline.commands import ingest_webdataset as webdataset
from pipeline.commands.index_dataset import IndexConfig
from pipeline.commands.index_dataset import run as run_index

AUDIOSET_CLASSES = "manifests/audioset_classes.csv"


@pytest.fixture
def clips(mp3s: list[RealClip]) -> list[RealClip]:
    """Real sounds under the ids that readers trip over."""
    ids = ["-_-PJHxphWE", "Yabcdefghij", "ab_12345_10", "abcdefghi_0"]
    return [replace(clip, clip_id=clip_id, mids=clip.mids[:1]) for clip, clip_id in zip(mp3s, ids, strict=True)]


def ways(tmp_path: Path, clips: list[RealClip]) -> Iterator[tuple[str, Callable[[str], object]]]:
    """Yields a name for each way in, and what makes a dataset that way."""
    segments = (str(write_segments(tmp_path / "segments.csv", clips)),)
    for number, spelling in enumerate(["{}", "Y{}", "{}_30.000", "{}_30.000_40.000", "{}_30_40", "{}_30000_40000"]):
        files = str(write_files(tmp_path / f"files{number}", clips, spelling))
        yield (
            f"files called {spelling}",
            lambda out, files=files: audioset.run(
                audioset.IngestAudiosetConfig(segments=segments, audio=files, out=out)
            ),
        )
    for name, prefix in (("balanced", ""), ("unbalanced", "07/")):
        hdf5 = str(write_passt_hdf5(tmp_path / f"{name}_train_segments_mp3.hdf", clips, prefix))
        yield (
            f"PaSST {name}",
            lambda out, hdf5=hdf5: passt.run(passt.IngestPasstConfig(hdf5=(hdf5,), out=out)),
        )
    waveforms = str(write_panns_hdf5(tmp_path / "balanced_train.h5", [*clips], 8000))
    yield "PANNs", lambda out: panns.run(panns.IngestPannsConfig(hdf5=(waveforms,), out=out))
    parquet = str(write_hugging_face_parquet(tmp_path / "00.parquet", clips))
    yield (
        "Hugging Face",
        lambda out: huggingface.run(huggingface.IngestHuggingfaceConfig(parquet=(parquet,), out=out)),
    )
    bare = str(write_labelless_tar(tmp_path / "bal_train00.tar", clips))
    yield (
        "Hugging Face's older tars",
        lambda out: webdataset.run(webdataset.IngestWebdatasetConfig(tars=(bare,), segments=segments, out=out)),
    )
    numbered = str(write_webdataset(tmp_path / "numbered" / "0.tar", clips))
    yield "WebDataset", lambda out: webdataset.run(webdataset.IngestWebdatasetConfig(tars=(numbered,), out=out))
    by_name = {f"audio/Y{clip.clip_id}.mp3": clip.audio for clip in clips}
    by_name |= {f"audio/Y{clip.clip_id}.json": {"label": clip.mids[0]} for clip in clips}  # pyright: ignore[reportAssignmentType]
    named = str(write_tar(tmp_path / "named" / "0.tar", {**by_name}))
    yield "WebDataset by name", lambda out: webdataset.run(webdataset.IngestWebdatasetConfig(tars=(named,), out=out))
    yield "index", lambda out: run_index(IndexConfig(str(tmp_path / "named")))
    for clip in clips:
        write_files(tmp_path / "classes" / clip.mids[0].replace("/", ":"), [clip], "Y{}_30.000")
    yield (
        "folders",
        lambda out: folder.run(folder.IngestFolderConfig(audio=str(tmp_path / "classes"), out=out)),
    )
    rows = "".join(f"deep/Y{clip.clip_id}.mp3,{clip.mids[0]}\n" for clip in clips)
    (tmp_path / "own.csv").write_text(f"path,label\n{rows}")
    write_files(tmp_path / "own" / "deep", clips, "Y{}")
    yield (
        "CSV",
        lambda out: own_csv.run(
            own_csv.IngestCsvConfig(
                csv=(str(tmp_path / "own.csv"),), audio=str(tmp_path / "own"), out=out, classes=AUDIOSET_CLASSES
            )
        ),
    )


def test_the_same_clip_has_the_same_id_labels_and_bytes_whichever_way_it_came(
    tmp_path: Path, clips: list[RealClip], contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).resolve().parents[3])
    for number, (way, make) in enumerate(ways(tmp_path, clips)):
        out = str(tmp_path / "named") if way == "index" else str(tmp_path / f"out{number}")
        make(out)
        found = contents(out)
        assert found.keys() == {clip.clip_id for clip in clips}, way
        if way != "folders":  # whose classes are the folders
            assert {clip_id: labels for clip_id, (labels, _) in found.items()} == {
                clip.clip_id: clip.labels for clip in clips
            }, way
        if way != "PANNs":
            assert {clip_id: audio for clip_id, (_, audio) in found.items()} == {
                clip.clip_id: clip.audio for clip in clips
            }, way
