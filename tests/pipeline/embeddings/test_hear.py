"""What HEAR's validator (hearvalidator 2021.0.6) asks of a module, and that the vectors are the models'."""

from pathlib import Path

import pytest
import torch
from embedding_models import write_student, write_teacher

from pipeline.dataset.vocabulary import Vocabulary
from pipeline.embeddings import hear
from pipeline.errors import UsageError


@pytest.fixture(params=["mn01", "passt_tiny", "ced_tiny", "m2d"])
def model(request: pytest.FixtureRequest, tmp_path: Path, five_classes: Vocabulary) -> hear.HearModel:
    write = write_student if request.param == "mn01" else write_teacher
    return hear.load_model(write(tmp_path / "model.safetensors", five_classes, request.param), device="cpu")


def noise(model: hear.HearModel, clips: int, seconds: float) -> torch.Tensor:
    samples = int(seconds * model.sample_rate)
    return 2 * torch.rand(clips, samples, generator=torch.Generator().manual_seed(0)) - 1


def test_the_model_says_its_rate_and_sizes(model: hear.HearModel) -> None:
    assert isinstance(model, torch.nn.Module)
    assert model.sample_rate in (16000, 22050, 32000, 44100, 48000)
    assert type(model.scene_embedding_size) is type(model.timestamp_embedding_size) is int


def test_scenes_get_a_vector_each_whatever_their_length(model: hear.HearModel) -> None:
    for seconds in (0.1, 2.74, 11.0):
        embeddings = hear.get_scene_embeddings(noise(model, 2, seconds), model)
        assert embeddings.shape == (2, model.scene_embedding_size)
        assert embeddings.dtype == torch.float32
        assert embeddings.isfinite().all()


def test_moments_get_a_vector_every_50_ms_to_the_end(model: hear.HearModel) -> None:
    for seconds in (1.07, 1.98):
        embeddings, timestamps = hear.get_timestamp_embeddings(noise(model, 2, seconds), model)
        assert embeddings.dtype == timestamps.dtype == torch.float32
        assert embeddings.shape == (*timestamps.shape, model.timestamp_embedding_size)
        assert len(timestamps) == 2
        steps = timestamps.diff(dim=1)
        torch.testing.assert_close(steps, torch.full_like(steps, 50.0), rtol=0, atol=1e-2)
        assert timestamps.min() == 0
        assert 1000 * seconds - 50 <= timestamps.max() <= 1000 * seconds


def test_a_moments_vector_hears_the_sound_around_it(tmp_path: Path, five_classes: Vocabulary) -> None:
    model = hear.load_model(write_student(tmp_path / "mn.safetensors", five_classes), device="cpu")
    sound = noise(model, 1, 1.0)
    embeddings, timestamps = hear.get_timestamp_embeddings(sound, model)
    middle = int(timestamps[0].tolist().index(500.0))
    torch.testing.assert_close(embeddings[:, middle], model(sound[:, 16_000 - 2560 : 16_000 + 2560]))


def test_layers_may_follow_the_models_name(tmp_path: Path, five_classes: Vocabulary) -> None:
    path = write_student(tmp_path / "mn.safetensors", five_classes)
    assert hear.load_model(f"{path}:mels", device="cpu").scene_embedding_size == 40
    assert hear.load_model(path, layers="mels", device="cpu").scene_embedding_size == 40
    with pytest.raises(UsageError, match="no layer is called that"):
        hear.load_model(f"{path}:top", device="cpu")
