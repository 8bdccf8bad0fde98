"""The front end that exports computes what the one that trains computes."""

import pytest
import torch

from student.dft_front_end import DftFrontEnd
from student.front_end import LogMelFrontEnd, front_end_config


@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"hopsize": 800, "n_mels": 40},
        {"n_fft": 512, "window_size": 400},
        {"n_fft": 1022, "window_size": 801, "hopsize": 123},
        {"n_fft": 1018, "window_size": 1018},
        {"n_mels": 256, "fmin": 50},
        {"resample_rate": 16_000, "window_size": 1024, "hopsize": 1600},
    ],
)
@pytest.mark.parametrize("samples", [16_000, 31_234])
def test_products_of_matrices_equal_the_fourier_transform(keywords: dict[str, int], samples: int) -> None:
    config = front_end_config(**keywords)
    sounds = 0.1 * torch.randn(2, samples, generator=torch.Generator().manual_seed(0))
    expected, found = LogMelFrontEnd(config).eval()(sounds), DftFrontEnd(config)(sounds)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)


def test_two_stages_cost_a_fifth_of_a_plain_product_or_less() -> None:
    config = front_end_config()
    plain = config.window_samples * 2 * (config.fft_samples // 2 + 1)
    assert DftFrontEnd(config).macs_per_frame < plain / 5
