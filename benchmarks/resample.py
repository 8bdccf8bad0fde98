"""Compares resamplers: speed, what they keep up to the mel bands' upper edge, and what they fold back as aliases.

    OMP_NUM_THREADS=1 python -m benchmarks.resample

Speed is in seconds of audio per second of one core's time. Gains are in dB relative to full scale, measured with tones;
`fold-back` is the loudest output for a tone that the new rate can't hold, `residue` what else than the tone comes out.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import soxr
import torch
import torchaudio

Resampler = Callable[[np.ndarray], np.ndarray]
RATES_HZ = ((44_100, 32_000), (48_000, 32_000), (48_000, 16_000), (22_050, 32_000))
BASELINE = "torchaudio, its default"
KAISER_BEST = {
    "lowpass_filter_width": 64,
    "rolloff": 0.9475937167399596,
    "resampling_method": "sinc_interp_kaiser",
    "beta": 14.769656459379492,
}
KAISER_FAST = KAISER_BEST | {"lowpass_filter_width": 16, "rolloff": 0.85, "beta": 8.555504641634386}


@dataclass(frozen=True, slots=True)
class Figures:
    """What was measured of one resampler at one pair of rates."""

    speed: float
    """Seconds of audio a second."""
    edge_gain_db: float
    """At 15/16 of the lower Nyquist frequency: 15 kHz for 32 kHz, the upper edge of the models' mel bands."""
    ripple_db: float
    """Largest deviation from 0 dB up to 90 % of the lower Nyquist frequency."""
    fold_back_db: float
    """Loudest output for tones from 5 % above the new Nyquist frequency; nan where the rate rises."""
    residue_db: float
    """Loudest rms of what comes out besides the tone, for tones up to 90 % of the lower Nyquist frequency."""


def soxr_resampler(quality: str, from_hz: int, to_hz: int) -> Resampler:
    """Make a resampler of the soxr library: QQ, LQ, MQ, HQ or VHQ."""
    return lambda samples: soxr.resample(samples, from_hz, to_hz, quality=quality)


def torchaudio_resampler(settings: dict, from_hz: int, to_hz: int) -> Resampler:
    """Make torchaudio's resampler, with its filter computed once."""
    resample = torchaudio.transforms.Resample(from_hz, to_hz, **settings)
    return lambda samples: resample(torch.from_numpy(samples)).numpy()


CANDIDATES: dict[str, Callable[[int, int], Resampler]] = {
    BASELINE: lambda from_hz, to_hz: torchaudio_resampler({}, from_hz, to_hz),
    "torchaudio, kaiser fast": lambda from_hz, to_hz: torchaudio_resampler(KAISER_FAST, from_hz, to_hz),
    "torchaudio, kaiser best": lambda from_hz, to_hz: torchaudio_resampler(KAISER_BEST, from_hz, to_hz),
    "soxr MQ": lambda from_hz, to_hz: soxr_resampler("MQ", from_hz, to_hz),
    "soxr HQ": lambda from_hz, to_hz: soxr_resampler("HQ", from_hz, to_hz),
    "soxr VHQ": lambda from_hz, to_hz: soxr_resampler("VHQ", from_hz, to_hz),
}


def measure(resample: Resampler, from_hz: int, to_hz: int, *, seconds: float, repeats: int) -> Figures:
    """Measure one resampler."""
    lower_nyquist = min(from_hz, to_hz) / 2
    kept = [pass_tone(resample, hz, from_hz, to_hz) for hz in np.linspace(0.02, 0.9, 23) * lower_nyquist]
    folded = [
        pass_tone(resample, hz, from_hz, to_hz) for hz in np.linspace(1.05 * lower_nyquist, 0.98 * from_hz / 2, 23)
    ]
    return Figures(
        speed=speed_of(resample, from_hz, seconds, repeats),
        edge_gain_db=decibels(pass_tone(resample, 15 / 16 * lower_nyquist, from_hz, to_hz)[0]),
        ripple_db=max(abs(decibels(gain)) for gain, _ in kept),
        fold_back_db=max(decibels(rest) for _, rest in folded) if to_hz < from_hz else float("nan"),
        residue_db=max(decibels(rest) for _, rest in kept),
    )


def pass_tone(resample: Resampler, hz: float, from_hz: int, to_hz: int) -> tuple[float, float]:
    """Send a tone of rms 1 through: the gain at its own frequency, and the rms of everything else."""
    tone = np.sqrt(2) * np.sin(2 * np.pi * hz * np.arange(from_hz) / from_hz)
    output = resample(tone.astype(np.float32)).astype(np.float64)
    inner = slice(len(output) // 8, -len(output) // 8)  # away from the ends, where the filter runs out of signal
    phase = 2 * np.pi * hz * np.arange(len(output))[inner] / to_hz
    if hz >= to_hz / 2:
        return 0.0, rms(output[inner])
    basis = np.stack([np.sin(phase), np.cos(phase)], axis=1)
    fit = np.linalg.lstsq(basis, output[inner], rcond=None)[0]
    return rms(basis @ fit), rms(output[inner] - basis @ fit)


def speed_of(resample: Resampler, from_hz: int, seconds: float, repeats: int) -> float:
    """Time clips of noise; the best of several runs is the one that was least disturbed."""
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, round(seconds * from_hz)).astype(np.float32)
    times = []
    for _ in range(repeats):
        start = time.thread_time()
        resample(noise)
        times.append(time.thread_time() - start)
    return seconds / min(times)


def rms(samples: np.ndarray) -> float:
    """Root of the mean square."""
    return float(np.sqrt(np.mean(samples**2)))


def decibels(amplitude: float) -> float:
    """20 log10, with a floor at the resolution of float32."""
    return 20 * np.log10(max(amplitude, 1e-9))


def main() -> None:
    """Print one table a pair of rates, in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of the clip that is timed")
    parser.add_argument("--repeats", type=int, default=20, help="runs; the fastest counts")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for from_hz, to_hz in RATES_HZ:
        print(f"\n{from_hz:,} → {to_hz:,} Hz\n")
        print(f"| resampler | speed, s/s | x {BASELINE} | edge, dB | ripple, dB | fold-back, dB | residue, dB |")
        print("|---|---:|---:|---:|---:|---:|---:|")
        baseline = 0.0
        for name, make in CANDIDATES.items():
            figures = measure(make(from_hz, to_hz), from_hz, to_hz, seconds=options.seconds, repeats=options.repeats)
            baseline = baseline or figures.speed
            print(
                f"| {name} | {figures.speed:,.0f} | {figures.speed / baseline:.2f} | {figures.edge_gain_db:.2f} "
                f"| {figures.ripple_db:.3f} | {figures.fold_back_db:.0f} | {figures.residue_db:.0f} |"
            )


if __name__ == "__main__":
    main()
