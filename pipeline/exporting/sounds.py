"""The sounds that an exported file and its model are compared on."""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np

from pipeline.dataset.audio import decode, resample
from pipeline.dataset.sound_sources import find_sounds
from pipeline.errors import DecodeError, PipelineError

MAX_SOUNDS = 24
_MAX_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class CheckSounds:
    """Some sounds, and what they are."""

    waveforms: list[np.ndarray]
    """Each (samples,), float32, at the rate that was asked for."""
    origin: str
    """Where they come from, for a line that says it."""


def check_sounds(data: str | None, sample_rate_hz: int, max_sounds: int = MAX_SOUNDS) -> CheckSounds:
    """Returns some sounds, spread evenly over what is there.

    Args:
        data: a dataset, or a folder or file of sounds; None is the sample in a checkout of this project, or where that
            is not, as in an installed wheel, sounds that are made here.
        sample_rate_hz: what they are resampled to.
        max_sounds: how many, at most.

    Raises:
        PipelineError: nothing there can be decoded.
    """
    if data is None and (data := _sample()) is None:
        made = list(_made_sounds(sample_rate_hz))
        return CheckSounds(made, f"{len(made)} chirps in noise, which were made for it")
    waveforms = list(_decoded(data, sample_rate_hz, max_sounds))
    if not waveforms:
        raise PipelineError(f"{data}: no sound that can be decoded, choose other data")
    return CheckSounds(waveforms, f"{len(waveforms)} sounds of {data}")


def _sample() -> str | None:
    folder = Path(str(files("manifests").joinpath("audioset_classes.csv"))).parent / "sample" / "audio"
    return str(folder) if folder.is_dir() else None


def _decoded(data: str, sample_rate_hz: int, max_sounds: int) -> Iterator[np.ndarray]:
    found = find_sounds([data])
    for number in np.unique(np.linspace(0, len(found) - 1, max_sounds).round().astype(int)).tolist():
        try:
            with found.open(number) as encoded:
                sound = decode(encoded, max_seconds=_MAX_SECONDS)
        except DecodeError:
            continue  # no matter here; `pipeline verify` names it
        yield resample(sound.samples, sound.sample_rate_hz, sample_rate_hz)


def _made_sounds(sample_rate_hz: int) -> Iterator[np.ndarray]:
    """Yields chirps in noise, (10 s of samples,) each, -1 to 1."""
    random = np.random.default_rng(0)
    time = np.arange(10 * sample_rate_hz) / sample_rate_hz
    for slope_hz in (100.0, 400.0, 1200.0):
        chirp = np.sin(2 * np.pi * (50.0 + slope_hz / 2 * time) * time)
        yield (0.3 * chirp + 0.05 * random.standard_normal(len(time))).astype(np.float32)
