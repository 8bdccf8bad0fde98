"""Reference outputs of the original projects, with the weights and waveforms that they came from."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from teacher import AudioTransformer


@dataclass(frozen=True, kw_only=True)
class Golden:
    """One model of the goldens: what went in and what came out."""

    weights: dict[str, Tensor]
    arrays: dict[str, np.ndarray]
    sample_rate_hz: int
    waveform: Callable[..., np.ndarray]

    def clips(self, duration: str) -> Tensor:
        """(clips, samples): "10s" is two clips, "4s3" one of 4.3 s."""
        seconds = float(duration.replace("s", "."))
        clips = 2 if duration == "10s" else 1
        return torch.from_numpy(np.stack([self.waveform(seconds, self.sample_rate_hz, seed) for seed in range(clips)]))

    def assert_features(self, features: Tensor, kind: str, duration: str) -> None:
        """Compare what the file holds of the features: their shape, their sum and every few values."""
        name = f"{kind}_{duration}"
        assert features.shape == tuple(self.arrays[f"{name}_shape"])
        across, along = self.arrays[f"{name}_stride"]
        expected = torch.from_numpy(self.arrays[f"{name}_strided"])
        torch.testing.assert_close(features[..., ::across, ::along], expected, rtol=1e-4, atol=1e-5)
        assert features.double().sum().item() == pytest.approx(float(self.arrays[f"{name}_sum"]), rel=1e-6)

    def assert_close(self, values: Tensor, name: str) -> None:
        """Compare with one array to the rounding error of float32."""
        torch.testing.assert_close(values, torch.from_numpy(self.arrays[name]), rtol=0, atol=2e-5)

    def assert_answers(self, model: AudioTransformer, kind: str, duration: str) -> None:
        """Compare features, logits and embedding for one duration."""
        features = model.front_end(self.clips(duration))
        if f"{kind}_{duration}_sum" in self.arrays:
            self.assert_features(features, kind, duration)
        sequence = model.forward_features(features)
        self.assert_close(model.forward_head(sequence), f"logits_{duration}")
        self.assert_close(model.forward_head(sequence, pre_logits=True), f"embedding_{duration}")


@pytest.fixture(scope="session")
def read_golden(golden_dir: Path, golden_config: Callable[[str], dict], fill: ModuleType) -> Callable[[str], Golden]:
    """Read a golden by name; not kept, as the weights of one take 350 MB."""

    def read(name: str) -> Golden:
        config = golden_config(name)
        filled = fill.fill_state_dict(config["shapes"], config["dtypes"], seed=config["fill"]["seed"])
        return Golden(
            weights={key: torch.from_numpy(value) for key, value in filled.items()},
            arrays=dict(np.load(golden_dir / f"{name}.npz")),
            sample_rate_hz=config["wave"]["sample_rate"],
            waveform=fill.waveform,
        )

    return read


@dataclass(frozen=True, kw_only=True)
class OriginalRun:
    """What an original project's network answers, and the weights, in a release's layout, that it ran with."""

    weights: dict[str, Tensor]
    classes: int
    size: dict[str, int]
    arrays: dict[str, np.ndarray]
    waveform: Callable[..., np.ndarray]


@pytest.fixture(scope="session")
def read_original(fill: ModuleType) -> Callable[[str], OriginalRun]:
    """Read one of the files of `golden/` beside this one."""

    def read(name: str) -> OriginalRun:
        folder = Path(__file__).with_name("golden")
        found = json.loads((folder / f"{name}.json").read_text())
        filled = fill.fill_state_dict(found["shapes"])
        return OriginalRun(
            weights={key: torch.from_numpy(value) for key, value in filled.items()},
            classes=found["num_classes"],
            size=found["size"],
            arrays=dict(np.load(folder / f"{name}.npz")),
            waveform=fill.waveform,
        )

    return read


@pytest.fixture
def fill_module(fill: ModuleType) -> Callable[[torch.nn.Module], None]:
    """Load into a module of any project the weights that belong to its key names; its logits then differ by clip."""

    def fill_in_place(module: torch.nn.Module) -> None:
        state = module.state_dict()
        filled = fill.fill_state_dict({key: tuple(value.shape) for key, value in state.items()})
        module.load_state_dict({key: torch.from_numpy(filled[key]).to(value.dtype) for key, value in state.items()})

    return fill_in_place


@pytest.fixture
def clips() -> Callable[..., Tensor]:
    """Two seeded clips of noise that fades in: `clips(sample_rate_hz, seconds=10.0)`."""

    def make(sample_rate_hz: int, seconds: float = 10.0) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        samples = round(seconds * sample_rate_hz)
        return 0.2 * torch.rand(2, samples, generator=generator).sub(0.5) * torch.linspace(0, 1, samples)

    return make
