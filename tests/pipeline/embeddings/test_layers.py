from pathlib import Path
from typing import Any

import pytest
import torch
from embedding_models import write_student, write_teacher

from pipeline.dataset.vocabulary import Vocabulary
from pipeline.embeddings.layers import Embedder
from pipeline.errors import UsageError
from pipeline.models.hearing import tag_waveforms
from pipeline.models.loading import load_model


def loaded(path: str) -> Any:
    return load_model(path).network


def noise(clips: int, samples: int) -> torch.Tensor:
    return torch.rand(clips, samples, generator=torch.Generator().manual_seed(0)) - 0.5


def test_a_students_layers_are_what_its_modules_give(tmp_path: Path, five_classes: Vocabulary) -> None:
    network = loaded(write_student(tmp_path / "mn.safetensors", five_classes))
    sound = noise(2, 32_000)
    blocks = network.blocks_in_order()
    heard = {}
    gate = next(module for name, module in blocks[4].named_modules() if name.endswith("conc_se_layers.0.fc1"))
    handles = [
        module.register_forward_hook(lambda module, inputs, output: heard.update({module: output}))
        for module in (blocks[5], gate)
    ]
    with torch.inference_mode():
        image = network.front_end(sound)
        maps = network.forward_features(image)
        wanted = [
            network.forward_head(maps, pre_logits=True),
            heard[blocks[5]].mean((2, 3)),
            heard[gate],
            maps.mean((2, 3)),
            image.mean((1, 3)),
            network(image),
        ]
    for handle in handles:
        handle.remove()
    embedder = Embedder(network, "penultimate+b5+se4+features+mels+logits")
    torch.testing.assert_close(embedder(sound), torch.cat(wanted, dim=1))
    assert embedder.size == sum(part.shape[1] for part in wanted)


def test_efficientats_own_embedding_is_blocks_and_squeezes(tmp_path: Path, five_classes: Vocabulary) -> None:
    network = loaded(write_student(tmp_path / "mn.safetensors", five_classes, "mn01", width_mult=1.0))
    assert Embedder(network, "efficientat").size == 1032  # as in their mn10_all_b_all_se


@pytest.mark.parametrize("name", ["passt_tiny", "ast_tiny", "ced_tiny", "beats", "m2d", "atst_clip_base"])
def test_a_teachers_penultimate_layer_is_what_its_classifier_sees(
    tmp_path: Path, five_classes: Vocabulary, name: str
) -> None:
    network = loaded(write_teacher(tmp_path / "teacher.safetensors", five_classes, name))
    sound = noise(2, round(2.0 * network.sample_rate_hz))
    features = network.front_end(sound if name != "ast_tiny" else torch.nn.functional.pad(sound, (0, 128_000)))
    with torch.inference_mode():
        wanted = network.forward_head(network.forward_features(features), pre_logits=True)
    lengths = None if name == "passt_tiny" else torch.tensor([sound.shape[1]] * 2)
    embedder = Embedder(network, "penultimate+b0+logits")
    found = embedder(sound, lengths)
    if name != "ast_tiny":  # whose front end takes a padded clip for a longer one
        torch.testing.assert_close(found[:, : wanted.shape[1]], wanted)
    torch.testing.assert_close(found[:, -5:], tag_waveforms(network, sound, lengths))
    alone = torch.cat([embedder(sound[:1], None if lengths is None else lengths[:1])])
    torch.testing.assert_close(found[:1], alone, rtol=1e-4, atol=1e-5)


def test_long_clips_of_a_teacher_are_averaged_over_their_pieces(tmp_path: Path, five_classes: Vocabulary) -> None:
    network = loaded(write_teacher(tmp_path / "ced.safetensors", five_classes, "ced_tiny"))
    sound = noise(1, 21 * 16_000)
    embedder = Embedder(network)
    assert embedder.size == 32
    long = embedder(sound, torch.tensor([sound.shape[1]]))
    assert long.shape == (1, 32)
    assert network.num_classes == 5


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("top", "no layer is called that"),
        ("b17", "b0 to b16"),
        ("se5+se1", "squeezes its channels in se4, se5, se6, se11"),
        ("penultimate+", "no layer is called that"),
    ],
)
def test_a_layer_that_a_student_lacks_is_named(
    tmp_path: Path, five_classes: Vocabulary, layer: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        Embedder(loaded(write_student(tmp_path / "mn.safetensors", five_classes)), layer)


@pytest.mark.parametrize(("layer", "message"), [("se1", "only students have that"), ("b3", "b0 to b2")])
def test_a_layer_that_a_teacher_lacks_is_named(
    tmp_path: Path, five_classes: Vocabulary, layer: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        Embedder(loaded(write_teacher(tmp_path / "t.safetensors", five_classes, "passt_tiny")), layer)
