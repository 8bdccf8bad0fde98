"""Measures `pipeline ingest`: planning millions of clips, and packing real ones.

    OMP_NUM_THREADS=1 python -m benchmarks.ingest --scratch /tmp/ingest

Planning: seconds, and the private memory that it takes at its peak, of three copies of AudioSet with `--clips` clips
each (the folder of files has a tenth of them). Baseline: the same HDF5, its rows kept as Python objects.

Packing: clips a second from an HDF5 of real MP3s, with one decoding process and with two, start included. Baselines:
decoding the same clips and nothing else, which is what has to be done to know that they can be; and copying their bytes
into a tar undecoded.

Every case runs in a process of its own.
"""

import argparse
import io
import multiprocessing
import shutil
import tarfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import webdataset.writer  # noqa: F401  imports torch, which is no part of the packing's time

from pipeline.dataset.audio import inspect_sound
from pipeline.dataset.vocabulary import audioset_vocabulary
from pipeline.ingest.audioset import AudiosetSource
from pipeline.ingest.hugging_face import HuggingFaceSource
from pipeline.ingest.packing import pack_shard
from pipeline.ingest.passt_hdf5 import PasstHdf5Source
from pipeline.ingest.plan import make_plan, plan_shards
from pipeline.ingest.preparing import ClipPreparation
from pipeline.ingest.sources import PlannedClip, Source

NAMES = audioset_vocabulary().names
NO_IDS = pa.array([], pa.string())
ALPHABET = np.frombuffer(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_", dtype="S1")


def youtube_ids(count: int) -> np.ndarray:
    """(count,) S11, all different for practical purposes."""
    return np.random.default_rng(0).choice(ALPHABET, (count, 11)).view("S11")[:, 0]


def write_passt(path: Path, ids: np.ndarray) -> None:
    """Write PaSST's layout without sounds: a plan doesn't read them."""
    targets = np.packbits(np.random.default_rng(1).random((1000, 527)) < 0.004, axis=1)
    with h5py.File(path, "w") as file:
        file["audio_name"] = np.char.add(np.char.add(b"07/Y", ids), b".mp3").astype("S20")
        file.create_dataset("mp3", shape=ids.shape, dtype=h5py.vlen_dtype(np.dtype("uint8")))
        file["target"] = np.resize(targets, (len(ids), 66))


def write_parquet(path: Path, ids: np.ndarray) -> None:
    """Write agkphysics' layout with sounds of one byte."""
    mids = [label.mid for label in audioset_vocabulary().classes]
    with pq.ParquetWriter(path, _hub_schema()) as writer:
        for start in range(0, len(ids), 100_000):
            part = [clip_id.decode() for clip_id in ids[start : start + 100_000]]
            audio = pa.StructArray.from_arrays(
                [pa.array([b"x"] * len(part)), pa.array([f"{clip_id}.flac" for clip_id in part])], ["bytes", "path"]
            )
            labels = pa.array([[mids[row % 527], mids[row % 401]] for row in range(len(part))])
            names = pa.array([[NAMES[row % 527], NAMES[row % 401]] for row in range(len(part))])
            writer.write_table(pa.table([pa.array(part), audio, labels, names], schema=_hub_schema()))


def _hub_schema() -> pa.Schema:
    audio = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    lists = pa.list_(pa.string())
    return pa.schema([("video_id", pa.string()), ("audio", audio), ("labels", lists), ("human_labels", lists)])


def write_files(folder: Path, ids: np.ndarray) -> None:
    """Write a segments list, and an empty file for each of its clips."""
    with (folder / "segments.csv").open("w") as lines:
        for row, clip_id in enumerate(ids):
            lines.write(f'{clip_id.decode()}, 30.000, 40.000, "/m/09x0r,/t/dd00088"\n')
            part = folder / "audio" / f"{row // 10_000:04}"
            if row % 10_000 == 0:
                part.mkdir(parents=True)
            (part / f"Y{clip_id.decode()}.wav").touch()


def measured(work: Callable[[], int]) -> dict[str, float]:
    """Returns clips, seconds, and by how many bytes the peak of the process's memory rose."""
    before = _memory("VmRSS")
    started = time.perf_counter()
    clips = work()
    return {"clips": clips, "seconds": time.perf_counter() - started, "bytes": _memory("VmHWM") - before}


def _memory(field: str) -> int:
    """Returns a figure of this process in bytes: VmRSS is what it has now, VmHWM the most that it had."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{field}:")[1].split()[0])


def plan(source: Source) -> int:
    """Plan a source and the fingerprints of its shards, as an ingest does."""
    clips = make_plan(source, audioset_vocabulary(), NO_IDS).clips
    for shard in plan_shards("train", clips, 1000, audioset_vocabulary()):
        shard.fingerprint()
    return clips.num_rows


def plan_as_objects(source: Source) -> int:
    """Keep what a source gives as Python objects: the baseline."""
    items = [item for item in source.scan(audioset_vocabulary(), Counter()) if isinstance(item, PlannedClip)]
    return len({item.clip_id for item in items})


def write_real_passt(path: Path, clips: int) -> None:
    """Write PaSST's layout with the sample's MP3s, over and over."""
    sounds = [file.read_bytes() for file in sorted(Path("manifests/sample/audio").glob("*.mp3"))]
    with h5py.File(path, "w") as file:
        file["audio_name"] = np.char.add(np.char.add(b"Y", youtube_ids(clips)), b".mp3").astype("S20")
        mp3s = file.create_dataset("mp3", shape=(clips,), dtype=h5py.vlen_dtype(np.dtype("uint8")))
        file["target"] = np.zeros((clips, 66), np.uint8)
        for row in range(clips):
            mp3s[row] = np.frombuffer(sounds[row % len(sounds)], np.uint8)


def pack(source: Source, out: Path, workers: int) -> int:
    """Pack all clips of a source into one shard."""
    clips = make_plan(source, audioset_vocabulary(), NO_IDS).clips
    shard = plan_shards("train", clips, clips.num_rows, audioset_vocabulary())[0]
    with source.open_reader() as read_clips, ClipPreparation(workers) as preparation:
        pack_shard(str(out), shard, read_clips, preparation)
    return clips.num_rows


def decode_only(source: PasstHdf5Source) -> int:
    """Read and decode all clips: the limit of one thread."""
    with h5py.File(source.paths[0]) as file:
        rows = len(file["audio_name"])  # pyright: ignore[reportArgumentType]
        for row in range(rows):
            inspect_sound(source.read_row(file, row))
    return rows


def copy_only(source: PasstHdf5Source, out: Path) -> int:
    """Copy all clips into a tar, good or bad."""
    with h5py.File(source.paths[0]) as file, tarfile.open(out, "w") as tar:
        rows = len(file["audio_name"])  # pyright: ignore[reportArgumentType]
        for row in range(rows):
            data = source.read_row(file, row)
            member = tarfile.TarInfo(f"{row}.mp3")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return rows


def _run(results: "multiprocessing.Queue[dict[str, float]]", work: Callable[..., int], arguments: tuple) -> None:
    results.put(measured(lambda: work(*arguments)))


def in_a_process(work: Callable[..., int], *arguments: object) -> dict[str, float]:
    """Measure `work` in a new process."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_run, args=(results, work, arguments))
    process.start()
    found = results.get()
    process.join()
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="an empty folder for some GB; removed at the end")
    parser.add_argument("--clips", type=int, default=2_000_000, help="clips to plan")
    parser.add_argument("--packed", type=int, default=1000, help="clips to pack")
    options = parser.parse_args()
    options.scratch.mkdir(parents=True)
    try:
        _measure_plans(options.scratch, options.clips)
        _measure_packing(options.scratch, options.packed)
    finally:
        shutil.rmtree(options.scratch)


def _measure_plans(scratch: Path, clips: int) -> None:
    ids = youtube_ids(clips)
    write_passt(scratch / "passt.hdf", ids)
    write_parquet(scratch / "hub.parquet", ids)
    write_files(scratch, ids[: clips // 10])
    passt = PasstHdf5Source((str(scratch / "passt.hdf"),))
    base = in_a_process(plan_as_objects, passt)
    cases = {
        "as Python objects (baseline)": base,
        "ingest passt": in_a_process(plan, passt),
        "ingest huggingface": in_a_process(plan, HuggingFaceSource((str(scratch / "hub.parquet"),))),
        "ingest audioset": in_a_process(
            plan, AudiosetSource((str(scratch / "segments.csv"),), (scratch / "audio").absolute())
        ),
    }
    for name, found in cases.items():
        per_clip, base_per_clip = found["bytes"] / found["clips"], base["bytes"] / base["clips"]
        print(
            f"planning, {name:28} {found['clips']:9,.0f} clips  {found['seconds']:6.1f} s  "
            f"{found['bytes'] / 1e6:6.0f} MB  {per_clip:4.0f} bytes a clip, {per_clip / base_per_clip:.2f} x baseline"
        )


def _measure_packing(scratch: Path, clips: int) -> None:
    write_real_passt(scratch / "real.hdf", clips)
    source = PasstHdf5Source((str(scratch / "real.hdf"),))
    decoding = in_a_process(decode_only, source)
    cases = {
        "decoding alone (baseline)": decoding,
        "copying undecoded": in_a_process(copy_only, source, scratch / "copy.tar"),
        "pack_shard, 1 process": in_a_process(pack, source, scratch / "one", 1),
        "pack_shard, 2 processes": in_a_process(pack, source, scratch / "two", 2),
    }
    for name, found in cases.items():
        speed, base = found["clips"] / found["seconds"], decoding["clips"] / decoding["seconds"]
        print(f"packing, {name:30} {speed:8.1f} clips/s  {speed / base:5.2f} x the baseline")


if __name__ == "__main__":
    main()
