"""A folder that holds what the commands of the docs name: tiny sets, stores, runs and files of weights."""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import published_layouts
import torch
from documented_commands import ROOT
from made_stores import fill_store, stamp_for
from published_copies import (
    RealClip,
    real_clips,
    write_files,
    write_hugging_face_parquet,
    write_labelless_tar,
    write_passt_hdf5,
    write_segments,
    write_webdataset,
)

import student
from pipeline.dataset.manifest import Manifest, read_manifest
from pipeline.logits.store import part_stem, publish_part, write_stamp

Do = Callable[[str], None]
"""Runs one of our commands in the folder."""
_WEIGHTS = re.compile(r"(mn\d\d\w*)=(\w+\.pt)")
_RELEASED = {"mn10_as": 527, "mn10_im": 1000}


def lay_out(folder: Path, make_dataset: Callable[..., Path], do: Do) -> None:
    """Fill the folder, which is the working folder."""
    (folder / "manifests").symlink_to(ROOT / "manifests")
    clips = [as_mp3(clip) for clip in real_clips("opus", 8)]
    lay_copies_of_audioset(folder, clips[:3], clips[3:5], clips[5:])
    lay_sounds(folder, clips[:3])
    lay_released(folder / "cache/hub/checkpoints")
    for name, part in {"train": "balanced_train", "eval": "eval"}.items():
        do(f"ingest audioset --segments {part}_segments.csv --audio downloads --out data/{name} --workers 1")
    shutil.copytree(folder / "data/train", folder / "DATASET")
    shutil.copytree(folder / "data/eval", folder / "EVAL")
    lay_stores(folder)
    lay_runs(folder, do)
    for name in ("mine", "fold1", "fold2", "fold3"):
        made = make_dataset(folder / "data/mine" if name == "mine" else folder / name, clips=16)
        if name != "mine":
            do(f"embed --data {made} --checkpoint runs/mn10 --out emb{name[-1]} --workers 0")


def as_mp3(clip: RealClip) -> RealClip:
    """Returns a clip as PaSST's files hold it."""
    return replace(clip, extension="mp3", audio=clip.encoded("MP3"))


def lay_copies_of_audioset(
    folder: Path, balanced: list[RealClip], unbalanced: list[RealClip], evaluation: list[RealClip]
) -> None:
    """Lay out AudioSet in each way that people hold it."""
    for part, short, clips in (
        ("balanced_train", "bal_train", balanced),
        ("unbalanced_train", "unbal_train", unbalanced),
        ("eval", "eval", evaluation),
    ):
        write_segments(folder / f"{part}_segments.csv", clips)
        write_passt_hdf5(folder / f"{part}_segments_mp3.hdf", clips)
        write_hugging_face_parquet(folder / f"AudioSet/data/{short}/00.parquet", clips)
        write_labelless_tar(folder / f"{short}00.tar", clips)
        for place in ("data/audioset", "downloads"):
            write_files(folder / place, clips)


def lay_sounds(folder: Path, clips: list[RealClip]) -> None:
    """Lay out recordings, folders of a class each, tables about them, and a published set."""
    for name in ("street.wav", "dog.wav", "forest.flac", "sound.wav", "recordings/one.wav"):
        published_layouts.write_sound(folder / name, 1, seconds=2.0)
    published_layouts.esc50(folder)
    sounds = [f"{kind}/{number}.wav" for kind in ("cat", "dog") for number in range(6)]
    for number, name in enumerate(sounds):
        published_layouts.write_sound(folder / "SOUNDS" / name, number)
    shutil.copytree(folder / "SOUNDS", folder / "DIR")  # stands for folders of several layouts
    write_files(folder / "DIR/cat", clips)
    write_webdataset(folder / "DIR/00.tar", clips)
    rows = [f"{name},{name},{kind},{kind}" for name in sounds for kind in [name.split("/")[0]]]
    (folder / "labels.csv").write_text("\n".join(["path,filename,label,category", *rows]) + "\n")
    (folder / "esc50.csv").write_text("index,mid,display_name\n0,/m/a,dog\n1,/m/b,cat\n")


def lay_released(cache: Path) -> None:
    """Put random weights where released ones lie once they were fetched."""
    cache.mkdir(parents=True)
    for name, classes in _RELEASED.items():
        url = student.released_weights(student.model_card(name))
        torch.save(student.create_model("mn10", num_classes=classes).state_dict(), cache / url.rpartition("/")[2])


def lay_stores(folder: Path) -> None:
    """Lay out the logits of the sets: a store of a mean, and one of three teachers."""
    manifest = read_manifest(str(folder / "data/eval"))
    fill_store(folder / "data/eval-logits", manifest, random_logits(1, manifest)[0])
    manifest = read_manifest(str(folder / "DATASET"))
    stamp = replace(stamp_for(manifest, "one", "two", "three"), members="float16")
    write_stamp(str(folder / "STORE"), stamp)
    [shard] = manifest.shards
    members = random_logits(3, manifest)
    ids, identity = manifest.clip_ids.to_pylist(), manifest.shard_identity(shard)
    mean = members.mean(axis=0, dtype=np.float32)
    publish_part(str(folder / "STORE"), part_stem(shard), ids, mean, stamp, identity, members=members)


def random_logits(teachers: int, manifest: Manifest) -> np.ndarray:
    """(teachers, clips, classes), float16."""
    return np.random.default_rng(0).normal(-3, 1, (teachers, len(manifest), len(manifest.vocabulary))).astype("f2")


def lay_runs(folder: Path, do: Do) -> None:
    """Train for a step, and put the run under each name that the docs use."""
    do(
        "train-student --model mn01 --epochs 1 --batch-size 2 --workers 0 --data data/train --eval-data data/eval "
        "--run runs/mn10"
    )
    for name in ("mn10-labels-only", "demo/distilled", "demo/labels-only"):
        shutil.copytree(folder / "runs/mn10", folder / "runs" / name)
    for name in ("train", "eval", "eval-logits"):
        shutil.copytree(folder / "data" / name, folder / "runs/demo" / name)


def lay_weights(folder: Path, words: Sequence[str]) -> None:
    """Write the plain files of weights that a command names as NAME=FILE, of the network that it says they are of."""
    options = {}
    for flag, value in pairwise(words):
        if flag.startswith("--model-options."):
            name = flag.partition(".")[2].replace("-", "_")
            options[name] = tuple(json.loads(value)) if value.startswith("[") else value
    classes = 2 if "--classes" in words and words[words.index("--classes") + 1] == "esc50.csv" else 527
    for named in filter(None, map(_WEIGHTS.fullmatch, words)):
        network = student.create_model(named[1], num_classes=classes, **options)
        torch.save(network.state_dict(), folder / named[2])
