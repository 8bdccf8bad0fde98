"""Writes a few real sounds in the exact schema of each copy of AudioSet that people hold."""

import csv
import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile

from pipeline.dataset.vocabulary import audioset_vocabulary

SAMPLE = Path(__file__).resolve().parents[2] / "manifests" / "sample"
CLASSES = 527


@dataclass(frozen=True)
class RealClip:
    """One sound of the sample."""

    clip_id: str
    mids: tuple[str, ...]
    start: str
    end: str
    extension: str
    audio: bytes

    @property
    def labels(self) -> list[int]:
        return sorted(audioset_vocabulary().index_of(mid) for mid in self.mids)

    @property
    def target(self) -> np.ndarray:
        """(classes,), bool."""
        return np.isin(np.arange(CLASSES), self.labels)

    def encoded(self, format: str, subtype: str | None = None, rate: int | None = None) -> bytes:
        """Returns the sound in another format."""
        samples, own_rate = soundfile.read(io.BytesIO(self.audio))
        stream = io.BytesIO()
        soundfile.write(stream, samples, rate or own_rate, format=format, subtype=subtype)
        return stream.getvalue()


def real_clips(extension: str, count: int) -> list[RealClip]:
    """Returns the first sounds of the sample's training list with an extension."""
    found = []
    with (SAMPLE / "balanced_train_segments.csv").open() as lines:
        for clip_id, start, end, mids in csv.reader(
            (line for line in lines if not line.startswith("#")), skipinitialspace=True
        ):
            path = SAMPLE / "audio" / f"{clip_id}.{extension}"
            if path.exists() and len(found) < count:
                found.append(RealClip(clip_id, tuple(mids.split(",")), start, end, extension, path.read_bytes()))
    assert len(found) == count
    return found


def write_segments(path: Path, clips: list[RealClip]) -> Path:
    lines = [f'{clip.clip_id}, {clip.start}, {clip.end}, "{",".join(clip.mids)}"\n' for clip in clips]
    path.write_text(
        "# Segments csv\n# num_ytids\n# YTID, start_seconds, end_seconds, positive_labels\n" + "".join(lines)
    )
    return path


def write_files(folder: Path, clips: list[RealClip], spelling: str = "{}") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for clip in clips:
        path = folder / f"{spelling.format(clip.clip_id)}.{clip.extension}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(clip.audio)
    return folder


def write_passt_hdf5(path: Path, clips: list[RealClip], prefix: str = "") -> Path:
    """As PaSST's `create_h5pymp3_dataset.py` lays it out; `prefix` is `NN/` in the unbalanced file."""
    packed = np.packbits(np.stack([clip.target for clip in clips]), axis=-1)
    with h5py.File(path, "w") as file:
        names = file.create_dataset("audio_name", shape=(len(clips),), dtype="S20")
        mp3s = file.create_dataset("mp3", shape=(len(clips),), dtype=h5py.vlen_dtype(np.dtype("uint8")))
        targets = file.create_dataset("target", shape=packed.shape, dtype=packed.dtype)
        for row, clip in enumerate(clips):
            names[row] = f"{prefix}Y{clip.clip_id}.mp3"
            mp3s[row] = np.frombuffer(clip.audio, np.uint8)
            targets[row] = packed[row]
    return path


def write_panns_hdf5(path: Path, clips: list[RealClip | None], samples: int = 320_000, dtype: str = "int16") -> Path:
    """As PANNs' `pack_waveforms_to_hdf5` lays it out; None is a clip that it did not find."""
    with h5py.File(path, "w") as file:
        names = file.create_dataset("audio_name", shape=(len(clips),), dtype="S20")
        waveforms = file.create_dataset("waveform", shape=(len(clips), samples), dtype=dtype)
        targets = file.create_dataset("target", shape=(len(clips), CLASSES), dtype=bool)
        file.attrs.create("sample_rate", data=32_000, dtype=np.int32)
        for row, clip in enumerate(clips):
            if clip is not None:
                names[row] = f"Y{clip.clip_id}.wav".encode()
                waveforms[row] = panns_waveform(clip, samples, dtype)
                targets[row] = clip.target
    return path


def panns_waveform(clip: RealClip, samples: int, dtype: str = "int16") -> np.ndarray:
    """(samples,), padded or cut as PANNs does; the rate is of no matter to the schema."""
    waveform, _ = soundfile.read(io.BytesIO(clip.audio), dtype="int16" if dtype == "int16" else "float32")
    mono = waveform if waveform.ndim == 1 else waveform[:, 0]
    return np.pad(mono, (0, max(0, samples - len(mono))))[:samples]


def write_hugging_face_parquet(path: Path, clips: list[RealClip], row_group_size: int = 100) -> Path:
    """As agkphysics/AudioSet's files: audio is a struct of bytes and path, labels are mids."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = {label.mid: label.name for label in audioset_vocabulary().classes}
    schema = pa.schema(
        [
            ("video_id", pa.string()),
            ("audio", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            ("labels", pa.list_(pa.string())),
            ("human_labels", pa.list_(pa.string())),
        ]
    )
    rows = [
        {
            "video_id": clip.clip_id,
            "audio": {"bytes": clip.audio, "path": f"{clip.clip_id}.{clip.extension}"},
            "labels": list(clip.mids),
            "human_labels": [names[mid] for mid in clip.mids],
        }
        for clip in clips
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=row_group_size)
    return path


def write_tar(path: Path, files: dict[str, bytes | dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_labelless_tar(path: Path, clips: list[RealClip]) -> Path:
    """As agkphysics/AudioSet's older tars: `audio/<split>/<id>.<ext>`, nothing else."""
    return write_tar(path, {f"audio/bal_train/{clip.clip_id}.{clip.extension}": clip.audio for clip in clips})


def write_webdataset(path: Path, clips: list[RealClip]) -> Path:
    """As the WebDataset copies: the key is a number, the json holds `id`, `label` (names) and `label_id` (indices)."""
    names = audioset_vocabulary().names
    files: dict[str, bytes | dict] = {}
    for number, clip in enumerate(clips):
        files[f"{number:08d}.{clip.extension}"] = clip.audio
        files[f"{number:08d}.json"] = {
            "id": clip.clip_id,
            "label": [names[label] for label in clip.labels],
            "label_id": clip.labels,
        }
    return write_tar(path, files)
