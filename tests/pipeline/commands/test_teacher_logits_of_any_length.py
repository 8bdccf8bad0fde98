"""Stage 1 against the originals, on clips from one second to thirty: `pipeline teacher-logits` itself, not a model."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from original_teachers import SECONDS, ast_features, ced_probabilities, fades, passt_clip
from torch import Tensor, nn

import teacher
from pipeline.commands.teacher_logits import TeacherLogitsConfig, run
from pipeline.dataset.audio import resample
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.vocabulary import Vocabulary
from pipeline.logits.store import LogitStore, open_store
from pipeline.training.checkpoints import save_weights

CLASSES = 5
RATE_HZ = 16_000

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("shared_ray")]


def lively(network: Any) -> Any:
    """Draw weights that don't shrink what goes through, so that logits differ where features do."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in network.parameters():
            scale = weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.1
            weight.add_(torch.randn(weight.shape, generator=generator) * scale)
    return network.eval()


@pytest.fixture
def clips() -> list[bytes]:
    return [_flac(noise) for noise in fades(RATE_HZ)]


def _flac(samples: Tensor) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, samples.numpy(), RATE_HZ, format="FLAC", subtype="PCM_16")
    return stream.getvalue()


def waveform(clip: bytes) -> Tensor:
    samples, rate = soundfile.read(io.BytesIO(clip), dtype="float32")
    assert rate == RATE_HZ
    return torch.from_numpy(samples)


@pytest.fixture
def manifest(build_dataset: Callable[..., Manifest], clips: list[bytes]) -> Manifest:
    return build_dataset("data", [(f"clip{place}", (0,), clip) for place, clip in enumerate(clips)], clips_per_shard=9)


@pytest.fixture
def write_own(tmp_path: Path, five_classes: Vocabulary) -> Callable[..., tuple[str, teacher.AudioTransformer]]:
    """Give `write(name, **settings)`: how `--teacher` spells a registered teacher with weights of its own, and it."""

    def write(name: str, **settings: Any) -> tuple[str, teacher.AudioTransformer]:
        network = lively(teacher.create_model(name, num_classes=CLASSES, **settings))
        save_own(tmp_path / f"{name}.safetensors", network, five_classes, **settings)
        return f"{name}={tmp_path}/{name}.safetensors", network

    return write


def save_own(path: Path, network: teacher.AudioTransformer, vocabulary: Vocabulary, **settings: Any) -> None:
    about = {"classes": len(vocabulary), "vocabulary_sha256": vocabulary.sha256, "kwargs": settings}
    save_weights(path, network.state_dict(), {"stage": "teacher", "model": network.model_name, **about})


def label(manifest: Manifest, store: Path, *teachers: str) -> Iterator[np.ndarray]:
    """Run stage 1; give each teacher's logits, (clips, classes)."""
    config = TeacherLogitsConfig(
        data=manifest.location,
        teacher=teachers,
        store=str(store),
        keep_members=True,
        precision="float32",
        batch_size=4,
        cpus_per_actor=1,
    )
    run(config)
    opened: LogitStore = open_store(str(store))
    [part] = opened.parts
    assert part.clips == len(SECONDS)
    return iter(opened.part_members(part).astype(np.float32))


def assert_alike(ours: np.ndarray, theirs: list[Tensor], otherwise: list[Tensor]) -> None:
    """Compare to the rounding of float16, and see that hearing the short clips otherwise would show."""
    expected = torch.stack(theirs).numpy()
    np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=2e-3)
    away = np.abs(torch.stack(otherwise).numpy() - expected).max(axis=1)
    assert away[0] > 0.05, "these weights would hide another treatment of short clips"


@torch.inference_mode()
def test_our_families_hear_every_length_as_their_originals(
    manifest: Manifest, clips: list[bytes], write_own: Callable, tmp_path: Path
) -> None:
    (passt_spec, passt), (ast_spec, ast), (ced_spec, ced) = (
        write_own("passt_tiny"),
        write_own("ast_tiny"),
        write_own("ced_tiny", depth=2),
    )
    found = label(manifest, tmp_path / "store", passt_spec, ast_spec, ced_spec)
    sounds = [waveform(clip) for clip in clips]
    silent = [nn.functional.pad(sound, (0, max(0, 160_000 - len(sound)))) for sound in sounds]

    def hear(network: teacher.AudioTransformer, sound: Tensor) -> Tensor:
        return network(network.front_end(sound[None]))[0]

    fast = [torch.from_numpy(resample(sound.numpy(), RATE_HZ, 32_000)) for sound in sounds]
    assert_alike(next(found), [hear(passt, passt_clip(one)) for one in fast], [hear(passt, one) for one in fast])

    def hear_features(sound: Tensor) -> Tensor:
        return ast(ast_features(sound)[None])[0]

    assert_alike(next(found), list(map(hear_features, sounds)), list(map(hear_features, silent)))

    renamed = {
        key.replace("init_bn.", "init_bn.1.").replace("head.", "outputlayer."): value
        for key, value in ced.state_dict().items()
    }

    def hear_ced(sound: Tensor) -> Tensor:
        return ced_probabilities(sound, renamed, heads=3).double().logit().float()

    assert_alike(next(found), list(map(hear_ced, sounds)), list(map(hear_ced, silent)))


@pytest.fixture
def ast(five_classes: Vocabulary, tmp_path: Path) -> Any:
    """Hugging Face's AST with one block, in a folder."""
    transformers = pytest.importorskip("transformers")
    model = lively(
        transformers.ASTForAudioClassification(transformers.ASTConfig(num_hidden_layers=1, **labels(five_classes)))
    )
    model.save_pretrained(tmp_path / "ast")
    transformers.ASTFeatureExtractor().save_pretrained(tmp_path / "ast")
    return model


@pytest.fixture
def wav2vec(five_classes: Vocabulary, tmp_path: Path) -> Any:
    """A tiny model that takes any length, in a folder."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=(8,),
        conv_stride=(320,),
        conv_kernel=(400,),
        num_feat_extract_layers=1,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        **labels(five_classes),
    )
    model = lively(transformers.Wav2Vec2ForSequenceClassification(config))
    model.save_pretrained(tmp_path / "wav2vec")
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(tmp_path / "wav2vec")
    return model


def labels(vocabulary: Vocabulary) -> dict[str, Any]:
    names = {place: label.name for place, label in enumerate(vocabulary.classes)}
    return {"id2label": names, "label2id": {name: place for place, name in names.items()}}


@torch.inference_mode()
def test_hugging_faces_models_hear_every_length_as_there(
    manifest: Manifest, clips: list[bytes], ast: Any, wav2vec: Any, write_own: Callable, tmp_path: Path
) -> None:
    import transformers

    spec, ours = write_own("ast_base_p16_s10_hf", depth=1)
    ours.load_state_dict(teacher.create_model("ast_base_p16_s10_hf", tmp_path / "ast", depth=1).state_dict())
    save_own(Path(spec.partition("=")[2]), ours, manifest.vocabulary, depth=1)

    def hear(model: Any, extractor: Any, sound: Tensor) -> Tensor:
        return model(**extractor(sound.numpy(), sampling_rate=RATE_HZ, return_tensors="pt")).logits[0]

    folders = [f"hf:ORG/{name}={tmp_path}/{name}" for name in ("ast", "wav2vec")]
    found = label(manifest, tmp_path / "store", spec, *folders)
    sounds = [waveform(clip) for clip in clips]
    silent = [nn.functional.pad(sound, (0, max(0, 160_000 - len(sound)))) for sound in sounds]
    for model, extractor in (
        (ast, transformers.ASTFeatureExtractor()),
        (ast, transformers.ASTFeatureExtractor()),
        (wav2vec, transformers.Wav2Vec2FeatureExtractor()),
    ):
        theirs, padded = ([hear(model, extractor, one) for one in some] for some in (sounds, silent))
        assert_alike(next(found), theirs, padded)
