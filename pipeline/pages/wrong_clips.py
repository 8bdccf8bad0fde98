"""The clips that a model is most wrong about, each with its sound and a spectrogram, within a number of bytes."""

import io
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import soundfile
import torch

from pipeline.dataset.audio import decode, resample
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.shards import read_ahead, read_clip_bytes
from pipeline.errors import PipelineError, StorageUnavailableError
from pipeline.pages.documents import data_url
from pipeline.scoring.diagnostics import clip_losses
from pipeline.scoring.scoring import System, probabilities_of
from pipeline.storage.files import RangeReader
from student import FrontEndConfig, LogMelFrontEnd

SOUND_RATE_HZ = 32_000
_TOP = 5
_PICTURE_FRAMES = 500


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassProbability:
    """A class, and what the model gives it."""

    name: str
    probability: float
    is_label: bool
    """Whether the clip carries it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WrongClip:
    """A clip, what it is said to be and what a model hears in it."""

    clip_id: str
    loss: float
    """Its cross entropy, in nats; see `pipeline.scoring.diagnostics.clip_losses`."""
    labels: tuple[ClassProbability, ...]
    """What it carries, the least probable first."""
    heard: tuple[ClassProbability, ...]
    """The most probable classes, the most probable first."""
    sound: str
    """A data: URL of an MP3; empty where it is left out."""
    picture: str
    """A data: URL of its spectrogram; empty where it can't be decoded."""
    seconds: float
    """What the sound and the picture show of it."""
    note: str
    """Why the sound is left out."""


def most_wrong_clips(
    system: System, manifest: Manifest, rows: np.ndarray, *, clips: int, max_seconds: float, max_bytes: float
) -> list[WrongClip]:
    """Returns the clips with the largest losses, the largest first.

    Args:
        system: of the manifest's clips.
        manifest: the dataset, whose shards are read.
        rows: which clips may be taken.
        clips: how many, at most.
        max_seconds: how much of each is decoded.
        max_bytes: of all sounds together; the clips behind are listed without theirs.

    Raises:
        StorageUnavailableError: the shards can't be reached.
    """
    losses = clip_losses(system, manifest, rows)
    known = np.flatnonzero(np.isfinite(losses))
    worst = known[np.argsort(-losses[known], kind="stable")[:clips]]
    chosen = rows[worst]
    reader, found, room = RangeReader(manifest.location), [], max_bytes
    read_ahead(reader, manifest, chosen)
    described = _describe(system, manifest, chosen)
    for row, loss, (labels, heard) in zip(chosen.tolist(), losses[worst].tolist(), described, strict=True):
        samples, note = _listen(reader, manifest, row, max_seconds)
        mp3 = b"" if note else encode_mp3(samples)
        if len(mp3) > room:
            mp3, note = b"", "left out: the sounds of this page would be larger than it was allowed to be"
        room -= len(mp3)
        found.append(
            WrongClip(
                clip_id=manifest.clip_id(row),
                loss=loss,
                labels=labels,
                heard=heard,
                sound=data_url(mp3, "audio/mpeg") if mp3 else "",
                picture=data_url(spectrogram(samples), "image/webp") if len(samples) else "",
                seconds=len(samples) / SOUND_RATE_HZ,
                note=note,
            )
        )
    reader.close()
    return found


def _describe(
    system: System, manifest: Manifest, rows: np.ndarray
) -> Iterator[tuple[tuple[ClassProbability, ...], tuple[ClassProbability, ...]]]:
    names, carried = manifest.vocabulary.names, manifest.label_matrix(rows, dtype=bool)
    for probabilities, labels in zip(probabilities_of(system, rows), carried, strict=True):
        best = np.argsort(-probabilities, kind="stable")
        told = [
            ClassProbability(name=names[index], probability=float(probabilities[index]), is_label=bool(labels[index]))
            for index in best.tolist()
        ]
        yield tuple(one for one in reversed(told) if one.is_label), tuple(told[:_TOP])


def _listen(reader: RangeReader, manifest: Manifest, row: int, max_seconds: float) -> tuple[np.ndarray, str]:
    """Returns (samples,) at `SOUND_RATE_HZ`, and why there are none."""
    try:
        sound = decode(read_clip_bytes(reader, manifest, row), max_seconds=max_seconds)
    except StorageUnavailableError:
        raise
    except PipelineError as error:
        return np.empty(0, np.float32), str(error)
    return resample(sound.samples, sound.sample_rate_hz, SOUND_RATE_HZ), ""


def encode_mp3(samples: np.ndarray) -> bytes:
    """Returns a sound as browsers play it everywhere.

    Args:
        samples: (samples,), -1 to 1, at `SOUND_RATE_HZ`; what is louder is cut.
    """
    stream = io.BytesIO()
    soundfile.write(stream, samples.clip(-1, 1), SOUND_RATE_HZ, format="MP3", compression_level=0.6)
    return stream.getvalue()


def spectrogram(samples: np.ndarray) -> bytes:
    """Returns a picture of a sound, a WebP: mel bands upwards, time to the right; colours that all eyes tell apart.

    Args:
        samples: (samples,), -1 to 1, at `SOUND_RATE_HZ`.
    """
    from matplotlib.image import imsave

    front_end = LogMelFrontEnd(FrontEndConfig()).eval()
    padded = np.pad(samples, (0, max(0, front_end.shortest_samples - len(samples))))
    with torch.inference_mode():
        log_mels = front_end(torch.from_numpy(padded)[None])[0, 0].numpy()  # (mels, frames)
    step = max(1, log_mels.shape[1] // _PICTURE_FRAMES)
    frames = log_mels.shape[1] // step
    image = log_mels[:, : frames * step].reshape(len(log_mels), frames, step).mean(axis=2)
    low, high = np.percentile(image, (5, 99.8))
    stream = io.BytesIO()
    imsave(
        stream,
        image[::-1],
        cmap="cividis",
        vmin=low,
        vmax=max(high, low + 1e-3),
        format="webp",
        pil_kwargs={"quality": 75},
    )
    return stream.getvalue()
