from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import teacher
from teacher.ced import logit_of_mean_probability


@pytest.fixture(scope="module")
def golden(read_golden: Callable):
    return read_golden("ced_tiny")


@pytest.fixture(scope="module")
def model(golden) -> teacher.AudioTransformer:
    return teacher.create_model("ced_tiny", golden.weights).eval()


@pytest.mark.parametrize("duration", ["10s", "4s3"])
def test_ced_answers_as_upstream(golden, model, duration: str) -> None:
    with torch.inference_mode():
        golden.assert_answers(model, "logmel", duration)


def test_long_clips_give_upstreams_mean_probability_over_pieces(golden, model) -> None:
    with torch.inference_mode():
        logits = model(model.front_end(golden.clips("25s")))
    golden.assert_close(logits.sigmoid(), "probabilities_25s")


def test_a_clip_of_whole_pieces_keeps_its_last_piece(model) -> None:
    features = torch.randn(1, 64, 2 * 1012, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        pieces = torch.stack([model(piece) for piece in features.split(1012, dim=2)])
        torch.testing.assert_close(model(features), logit_of_mean_probability(pieces), rtol=0, atol=2e-5)


def test_mean_of_certain_probabilities_stays_finite() -> None:
    logits = torch.tensor([[[-200.0, 200.0, 1.0]], [[-200.0, 200.0, 1.0]]])
    torch.testing.assert_close(logit_of_mean_probability(logits), torch.tensor([[-200.0, 200.0, 1.0]]))


def test_training_adapts_the_normalisation_of_the_bands(clips: Callable[..., Tensor]) -> None:
    model = teacher.create_model("ced_tiny", num_classes=3, depth=1)
    model(model.front_end(clips(16000, 1.0)))
    assert model.state_dict()["init_bn.running_mean"].all()


def uneven(model: teacher.AudioTransformer, clips: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    """Features of four clips of unlike lengths, with noise behind the shorter ones, and how many frames are theirs."""
    lengths = torch.tensor([16_000, 160_000, 40_000, 16_000])
    features, frames = model.front_end(clips(16000, 10.0)[:1].expand(4, -1), lengths=lengths), lengths // 160 + 1
    beyond = torch.arange(features.shape[2]) >= frames[:, None]
    return torch.where(beyond[:, None], torch.randn(features.shape), features), frames


def test_statistics_are_those_of_the_clips_own_frames(clips: Callable[..., Tensor]) -> None:
    model = teacher.create_model("ced_tiny", num_classes=3, depth=1)
    features, frames = uneven(model, clips)
    model(features, frames=frames)
    own = torch.cat([clip[:, :count] for clip, count in zip(features, frames.tolist(), strict=True)], dim=1)
    torch.testing.assert_close(model.state_dict()["init_bn.running_mean"], 0.01 * own.mean(dim=1))


def test_a_clip_in_training_loses_the_same_patches_whoever_its_neighbours_are(clips: Callable[..., Tensor]) -> None:
    model = teacher.create_model("ced_tiny", num_classes=3, depth=1, s_patchout_t=20, u_patchout=30).train()
    model.get_submodule("init_bn").eval()
    features, frames = uneven(model, clips)

    def tag(some: slice) -> Tensor:
        return model(features[some], torch.Generator().manual_seed(1), frames[some])

    torch.testing.assert_close(torch.cat([tag(slice(0, 2)), tag(slice(2, 4))]), tag(slice(0, 4)))


def test_a_short_clip_loses_its_share_of_the_patches_and_never_all() -> None:
    model = teacher.create_model("ced_tiny", num_classes=3, depth=1, s_patchout_t=40, u_patchout=20)
    columns = 62  # of 10 s; there are time encodings for one more
    assert model.patchout(columns) == model.patchout(model.config.frames // 16) == (40, 20)
    assert model.patchout(columns // 2) == (int(40 * (columns // 2) / columns), int(20 * (columns // 2) / columns))
    assert all(model.patchout(few)[0] < few for few in range(1, columns))
