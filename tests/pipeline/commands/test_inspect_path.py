from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_stores import fill_store, stamp_for

from pipeline import cli
from pipeline.commands.inspect_path import InspectConfig, run
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.views import ViewConfig, ViewsStamp
from pipeline.errors import PipelineError, UsageError
from pipeline.ingest.rejections import Rejection, tabulate, write_rejections
from pipeline.logits.stamp import ImportStamp, SourceFile, StoreStamp, TeacherStamp
from pipeline.logits.store import publish_part, write_stamp
from pipeline.runtime.progress import MetricLog


@pytest.fixture
def data(build_dataset: Callable[..., Manifest], make_noises: Callable[[int, int], list]) -> Manifest:
    return build_dataset("data", make_noises(7, 5))


@pytest.fixture
def store(data: Manifest, tmp_path: Path) -> str:
    """Logits of the first of two shards."""
    teacher = TeacherStamp(name="passt_tiny", weight=2.0, sha256="abc" * 20, front_end="128 mel bands")
    stamp = replace(stamp_for(data), teachers=(teacher,), precision="bfloat16")
    return fill_store(tmp_path / "store", data, np.zeros((len(data), 5)), stamp=stamp, shards=data.shards[:1]).location


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run `inspect` and give what it prints, without frames and line breaks."""

    def inspect(path: object, data: str | None = None) -> str:
        run(InspectConfig(str(path), data=data))
        return " ".join(capsys.readouterr().out.translate(str.maketrans("│┃━─┌┐└┘├┤┼", " " * 11)).split())

    return inspect


def test_a_dataset_shows_counts_classes_and_what_was_rejected(data: Manifest, show: Callable[..., str]) -> None:
    write_rejections(data.location, tabulate([Rejection("a", None, "file not found")]))
    counts = data.label_counts()
    text = show(data.location)
    assert "clips 7 shards 2, 0.1 MB" in text
    assert "encoded: wav 7" in text
    assert f"{(counts > 0).sum()} of 5 present" in text
    assert f"most frequent Sound {counts.argmax()} {counts.max()}" in text
    assert "rejected files file not found 1" in text


def test_a_store_shows_its_stamp_and_how_much_of_a_dataset_it_covers(
    data: Manifest, store: str, show: Callable[..., str]
) -> None:
    text = show(store)
    assert "clips 5 in 1 parts" in text
    assert "logits of 5 classes, computed in bfloat16" in text
    assert "teacher 1 passt_tiny, weight 2" in text
    assert "coverage" not in text
    assert f"clips with logits 5 of 7 (71.4 %) not covered 1: {data.shards[1]} (2 clips)" in show(store, data.location)


def test_a_run_shows_how_far_it_got(tmp_path: Path, show: Callable[..., str]) -> None:
    (tmp_path / "config.toml").write_text('model = "mn04"\nbatch_size = 64\n')
    assert "nothing logged yet" in show(tmp_path)
    with MetricLog(tmp_path) as log:
        log.write(1200, {"eval/mAP": 0.25}, epoch=3)
    text = show(tmp_path)
    assert "step 1,200, epoch 3" in text
    assert "best mAP 0.2500 in epoch 3" in text
    assert "model mn04, batch_size 64" in text


def test_what_is_none_of_these_is_named(tmp_path: Path, data: Manifest) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(PipelineError, match=r"empty: is neither a dataset \(manifest\.parquet\)"):
        run(InspectConfig(str(tmp_path / "empty")))
    with pytest.raises(PipelineError, match="there is nothing here"):
        run(InspectConfig(str(tmp_path / "nowhere")))
    (Path(data.location) / "manifest.parquet").unlink()
    with pytest.raises(PipelineError, match=r"has no manifest\.parquet\. Run `pipeline index"):
        run(InspectConfig(data.location))


def test_a_store_says_its_form(data: Manifest, store: str, tmp_path: Path, show: Callable[..., str]) -> None:
    plain = StoreStamp.from_json((Path(store) / "store.json").read_bytes(), store)
    views = ViewsStamp(count=2, config=ViewConfig(seed=7, max_shift_ms=50))
    imported = ImportStamp(
        layout="ced-hdf5",
        files=(SourceFile(name="logits.h5", size=2_000_000, sha256="d" * 64),),
        origin="CED base, by its authors",
        held="probabilities",
        conversion="logit of them",
    )
    ids = data.clip_ids.to_pylist()[:5]
    for name, stamp, members, told in (
        ("members", replace(plain, members="float16"), np.zeros((1, 5, 5), np.float16), ["each teacher's own logits"]),
        ("top", replace(plain, top_k=2), None, ["the 2 largest of each clip, and one number for the rest"]),
        (
            "views",
            replace(plain, views=views),
            None,
            [
                "clips 5 in",
                "2 of each clip",
                "of seed 7",
                "up to 50 ms and 6 dB",
                "by up to 9 Hz, the upper one by 1000",
            ],
        ),
        (
            "imported",
            replace(plain, teachers=(), imported=imported),
            None,
            ["probabilities laid out as ced-hdf5 CED base, by its authors logit of them logits.h5, 2.0 MB"],
        ),
    ):
        folder = str(tmp_path / name)
        write_stamp(folder, stamp)
        rows = len(ids) * stamp.view_count
        publish_part(folder, "a", ids, np.zeros((rows, 5)), stamp, "", members=members)
        text = show(folder)
        size = (Path(folder) / "a.parquet").stat().st_size
        for words in (*told, f"space {size / 5:,.0f} bytes a clip"):
            assert words in text, (name, words, text)
    for words in ("largest", "each teacher", "of each clip", "laid out"):
        assert words not in show(store)


def test_coverage_is_asked_of_a_store_only(data: Manifest) -> None:
    with pytest.raises(UsageError, match="is a dataset"):
        run(InspectConfig(data.location, data=data.location))


def test_the_command_takes_the_path_as_its_argument(store: str, data: Manifest, tmp_path: Path) -> None:
    assert cli.run(["inspect", store, "--data", data.location]) == 0
    assert cli.run(["inspect", str(tmp_path / "nowhere")]) == 1
    assert cli.run(["inspect", data.location, "--data", data.location]) == 2
