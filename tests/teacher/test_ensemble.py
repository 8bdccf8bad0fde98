from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from teacher import AudioTransformer, Ensemble, create_model, ensemble_logits

FIRST = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
SECOND = torch.tensor([[5.0, 0.0], [-1.0, 4.0]])


def test_weights_count_by_their_ratio() -> None:
    expected = 0.75 * FIRST + 0.25 * SECOND
    torch.testing.assert_close(ensemble_logits([FIRST, SECOND], [3, 1]), expected)
    torch.testing.assert_close(ensemble_logits([FIRST, SECOND], [0.3, 0.1]), expected)


def test_one_teacher_is_its_own_ensemble() -> None:
    assert torch.equal(ensemble_logits([FIRST], [7.0]), FIRST)


def test_half_precision_members_are_averaged_in_float32() -> None:
    averaged = ensemble_logits([FIRST.bfloat16(), SECOND.half()], [1, 1])
    assert averaged.dtype == torch.float32
    torch.testing.assert_close(averaged, (FIRST + SECOND) / 2)


@pytest.mark.parametrize(
    ("logits", "weights", "message"),
    [
        ([], [], "at least one teacher"),
        ([FIRST], [1.0, 2.0], "1 teachers, but 2 weights"),
        ([FIRST, SECOND[:, :1]], [1.0, 1.0], r"teacher 2 gives logits of shape \(2, 1\)"),
        ([FIRST, SECOND], [1.0, 0.0], "teacher 2 has weight 0.0"),
        ([FIRST, SECOND], [float("nan"), 1.0], "teacher 1 has weight nan"),
    ],
)
def test_what_cannot_be_averaged_is_refused(logits: list, weights: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ensemble_logits(logits, weights)


@pytest.fixture(scope="module")
def passt() -> AudioTransformer:
    return _tiny("passt_tiny", 0)


@pytest.fixture(scope="module")
def ast() -> AudioTransformer:
    return _tiny("ast_tiny", 1)


def _tiny(name: str, seed: int) -> AudioTransformer:
    torch.manual_seed(seed)
    return create_model(name, num_classes=7).eval()


class Loudness(nn.Module):
    """A teacher of somebody else's: the fewest attributes that the ensemble asks for, and its clips in a row."""

    sample_rate_hz = 16000
    input_seconds = 1.0

    def __init__(self, max_clips: int = 100) -> None:
        super().__init__()
        self.front_end = nn.Identity()
        self.max_clips = max_clips
        self.asked: list[int] = []

    def forward(self, features: Tensor) -> Tensor:
        self.asked.append(len(features))
        if len(features) > self.max_clips:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore about it.")
        return features.square().mean(dim=1, keepdim=True).expand(-1, 7)  # (batch, classes)


def both_rates(clips: Callable[..., Tensor]) -> dict[int, Tensor]:
    return {16000: clips(16000), 32000: clips(32000)}


def test_each_member_answers_as_it_does_alone(
    clips: Callable[..., Tensor], passt: AudioTransformer, ast: AudioTransformer
) -> None:
    waveforms = both_rates(clips)
    ensemble = Ensemble([passt, ast, Loudness()], [1, 1, 2])
    assert (ensemble.sample_rates_hz, ensemble.input_seconds) == ([16000, 32000], 10.0)
    found = ensemble(waveforms)  # (teachers, batch, classes)
    alone = [
        passt(passt.front_end(waveforms[32000])),
        ast(ast.front_end(waveforms[16000])),
        waveforms[16000][:, :16000].square().mean(dim=1, keepdim=True).expand(-1, 7),  # its first second
    ]
    for mine, its in zip(found, alone, strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=1e-6)
    torch.testing.assert_close(ensemble.mean(found), ensemble_logits(alone, [1, 1, 2]), rtol=0, atol=1e-6)


def test_members_with_equal_front_ends_share_one_spectrogram(
    clips: Callable[..., Tensor], passt: AudioTransformer, ast: AudioTransformer
) -> None:
    ensemble = Ensemble([passt, ast, _tiny("passt_tiny", 2)], [1, 1, 1])
    ran: list[int] = []
    for place, member in enumerate(ensemble.members):
        member.get_submodule("front_end").register_forward_hook(lambda *_, place=place: ran.append(place))
    found = ensemble(both_rates(clips))
    assert ran == [0, 1]
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_lower_precision_stays_near_float32_and_leaves_the_front_end_alone(
    clips: Callable[..., Tensor], precision: torch.dtype
) -> None:
    waveforms = both_rates(clips)
    exact = Ensemble([_tiny("passt_tiny", 0), _tiny("ast_tiny", 1)], [1, 1])(waveforms)
    ensemble = Ensemble([_tiny("passt_tiny", 0), _tiny("ast_tiny", 1)], [1, 1], precision)
    features: list[Tensor] = []
    ensemble.members[0].get_submodule("front_end").register_forward_hook(lambda *parts: features.append(parts[2]))
    found = ensemble(waveforms)
    assert found.dtype == features[0].dtype == torch.float32
    assert torch.equal(features[0], _tiny("passt_tiny", 0).front_end(waveforms[32000]))
    assert not torch.equal(found, exact), "the networks ran in float32"
    torch.testing.assert_close(found, exact, rtol=0, atol=0.05)


def test_batch_too_large_for_the_memory_is_halved_once_and_loses_nothing(caplog: pytest.LogCaptureFixture) -> None:
    waveforms = {16000: torch.rand(7, 16000, generator=torch.Generator().manual_seed(0))}
    small = Loudness(max_clips=2)
    ensemble = Ensemble([small], [1])
    assert torch.equal(ensemble(waveforms), Ensemble([Loudness()], [1])(waveforms))
    assert small.asked == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    small.asked.clear()
    ensemble(waveforms)
    assert small.asked == [1] * 7
    assert [record.getMessage() for record in caplog.records] == [
        "7 clips at once are too many for the memory (CUDA out of memory. Tried to allocate 2 GiB.); going on with 3",
        "3 clips at once are too many for the memory (CUDA out of memory. Tried to allocate 2 GiB.); going on with 1",
    ]


def test_moved_edges_reach_the_members_that_can_move_them_also_in_a_halved_batch(
    clips: Callable[..., Tensor], passt: AudioTransformer, ast: AudioTransformer
) -> None:
    waveforms = both_rates(clips)
    shifts = torch.tensor([[9, -999], [0, 1000]])
    ensemble = Ensemble([passt, ast, Loudness()], [1, 1, 1])
    still, moved = ensemble(waveforms), ensemble(waveforms, shifts)
    alone = passt(passt.front_end(waveforms[32000], edge_shifts_hz=shifts))
    torch.testing.assert_close(moved[0], alone, rtol=0, atol=1e-6)
    assert not torch.allclose(moved[0], still[0], rtol=0, atol=1e-4)
    assert torch.equal(moved[1:], still[1:])
    ensemble.largest_batch = 1
    torch.testing.assert_close(ensemble(waveforms, shifts), moved, rtol=0, atol=1e-5)


def test_memory_too_small_for_one_clip_is_an_error() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        Ensemble([Loudness(max_clips=0)], [1])({16000: torch.rand(2, 16000)})


def test_no_clips_get_no_answers() -> None:
    assert Ensemble([Loudness(), Loudness()], [1, 1])({16000: torch.rand(0, 16000)}).shape == (2, 0, 7)


def test_waveforms_that_do_not_suit_the_members_are_refused(passt: AudioTransformer) -> None:
    ensemble = Ensemble([passt, Loudness()], [1, 1])
    with pytest.raises(ValueError, match="no waveforms at 32000 Hz"):
        ensemble({16000: torch.rand(2, 16000)})
    with pytest.raises(ValueError, match="the batches differ in size"):
        ensemble({16000: torch.rand(2, 16000), 32000: torch.rand(3, 32000)})


def test_members_of_other_classes_are_refused(clips: Callable[..., Tensor], ast: AudioTransformer) -> None:
    with pytest.raises(ValueError, match=r"teacher 2 gives logits of shape \(2, 9\)"):
        Ensemble([ast, create_model("passt_tiny", num_classes=9)], [1, 1])(both_rates(clips))


def test_ensembles_without_members_or_with_odd_weights_are_refused(ast: AudioTransformer) -> None:
    with pytest.raises(ValueError, match="at least one teacher"):
        Ensemble([], [])
    with pytest.raises(ValueError, match="1 teachers, but 2 weights"):
        Ensemble([ast], [1, 2])
    with pytest.raises(ValueError, match="weight -1"):
        Ensemble([ast], [-1])
