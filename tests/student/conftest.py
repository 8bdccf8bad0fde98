"""Models filled with the reference weights."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="session")
def golden_weights(fill, golden_config) -> Callable[[str], dict[str, Tensor]]:
    """The state dict that a reference's outputs were computed with, by the reference's name."""

    def weights(name: str) -> dict[str, Tensor]:
        config = golden_config(name)
        arrays = fill.fill_state_dict(config["shapes"], config["dtypes"], **config["fill"])
        return {key: torch.from_numpy(array) for key, array in arrays.items()}

    return weights
