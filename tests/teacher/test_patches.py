from typing import Any

import pytest
import torch

from teacher.patches import PatchEmbed, drop_patches

# Each patch of the grid holds its row and its column: (batch 2, embed_dim 2, 5 rows, 7 columns).
GRID = torch.stack(torch.meshgrid(torch.arange(5.0), torch.arange(7.0), indexing="ij")).expand(2, 2, 5, 7)
NONE: dict[str, Any] = {"time": 0, "frequency": 0, "unstructured": 0}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_without_patchout_the_patches_stay_in_order_row_by_row() -> None:
    sequence = drop_patches(GRID, **NONE)
    assert sequence.shape == (2, 35, 2)
    assert torch.equal(sequence[0], torch.cartesian_prod(torch.arange(5.0), torch.arange(7.0)))


def test_structured_patchout_leaves_out_whole_columns_and_rows() -> None:
    kept = drop_patches(GRID, time=3, frequency=2, unstructured=0, generator=seeded(0))[0]  # (patches, 2)
    rows, columns = kept[:, 0].unique(), kept[:, 1].unique()
    assert (len(rows), len(columns)) == (3, 4)
    assert torch.equal(kept, torch.cartesian_prod(rows, columns))


def test_unstructured_patchout_leaves_out_single_patches_in_order() -> None:
    kept = drop_patches(GRID, time=0, frequency=0, unstructured=30, generator=seeded(0))[0]
    places = kept[:, 0] * 7 + kept[:, 1]
    assert len(places) == 5
    assert torch.equal(places, places.unique())


def test_the_generator_alone_decides_what_stays() -> None:
    torch.manual_seed(0)
    kept = [drop_patches(GRID, time=2, frequency=1, unstructured=3, generator=seeded(seed)) for seed in (5, 5, 6)]
    assert torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[0], kept[2])
    assert torch.equal(torch.rand(1), torch.rand(1, generator=seeded(0)))  # torch's global generator is as it was


@pytest.mark.parametrize(("name", "flag"), [("time", "time"), ("frequency", "frequency"), ("unstructured", "single")])
def test_patchout_of_everything_is_refused(name: str, flag: str) -> None:
    with pytest.raises(ValueError, match=rf"patchout\.{flag} is 35, and there are"):
        drop_patches(GRID, **{**NONE, name: 35})


def test_features_may_have_timms_axis_of_one_channel_and_no_more() -> None:
    embed, features = PatchEmbed((16, 16), 10, 8), torch.rand(1, 128, 100)
    assert torch.equal(embed(features[:, None]), embed(features))
    with pytest.raises(ValueError, match=r"give \(batch, mels, frames\)"):
        embed(torch.zeros(1, 3, 128, 100))
