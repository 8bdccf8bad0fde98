"""Teachers of others: a user's own module, one that a package offers, one of Hugging Face's."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from pipeline.dataset.manifest import Manifest
from pipeline.dataset.vocabulary import LabelClass, Vocabulary
from pipeline.errors import CheckpointError, UsageError
from pipeline.labelling.foreign_teachers import Teacher, sha256_of_tensors
from pipeline.labelling.shard_labeller import LabellerConfig, ShardLabeller
from pipeline.labelling.teacher_spec import TeacherSpec, parse_teachers, stamp_teachers
from pipeline.models.weights import sha256_of_file

MODULE = """
import torch
from torch import nn

class Loudness(nn.Module):
    sample_rate_hz = 16000
    input_seconds = 2.0

    def __init__(self, shift=0.0, names=tuple(f"Sound {index}" for index in range(5))):
        super().__init__()
        self.front_end = nn.Identity()
        self.shift = nn.Parameter(torch.tensor(shift))
        self.class_names = names

    def forward(self, features):
        return features.abs().mean(dim=1, keepdim=True) + self.shift - torch.arange(len(self.class_names))

def build(checkpoint=None):
    return Loudness() if checkpoint is None else Loudness(float(open(checkpoint).read()))

def build_shuffled():
    return Loudness(names=("bark", "sound 4", "/m/3", "Sound  2", "SOUND 1", "Sound 0"))

def build_other(): return Loudness(names=("bark", "Sound 1"))
def build_double(): return Loudness(names=(*Loudness().class_names, "sound 0"))

def build_nameless():
    model = Loudness()
    del model.class_names
    model.forward = lambda features: torch.zeros(len(features), 4)
    return model

def build_probabilities():
    model = build()
    model.forward = lambda features: torch.full((len(features), 5), 0.5)
    return model

def build_broken():
    model = build()
    model.front_end = nn.Linear(3, 3)
    return model

def build_diverged(): return Loudness(float("nan"))

def build_dividing():
    model = build()
    model.forward = lambda features: 1 / features.abs().mean(dim=1, keepdim=True).expand(-1, 5)
    return model

def build_list(): return [1]
def build_bare(): return nn.Linear(3, 3)
def build_refusing(checkpoint): raise ValueError("this is no checkpoint of mine")
"""


@pytest.fixture(autouse=True)
def my_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "my_teachers.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "my_teachers", raising=False)
    return folder


@pytest.fixture
def manifest(build_dataset: Callable[..., Manifest], make_noises: Callable) -> Manifest:
    return build_dataset("data", make_noises(3, 5))


def ask(spec: TeacherSpec, manifest: Manifest) -> torch.Tensor:
    network: Any = spec.load(manifest).network
    return network(network.front_end(torch.full((1, 32_000), 0.5)))


def test_a_users_own_module_teaches(manifest: Manifest, tmp_path: Path) -> None:
    spec = TeacherSpec.parse("my_teachers:build@2")
    loaded = spec.load(manifest)
    assert isinstance(loaded.network, Teacher)
    assert (loaded.sample_rate_hz, loaded.input_seconds) == (16000, 2.0)
    stamp = stamp_teachers([spec], manifest, "float32").teachers[0]
    assert (stamp.name, stamp.weight, stamp.front_end) == ("my_teachers:build", 2.0, "Identity(), 2 s")
    assert stamp.sha256 == sha256_of_tensors({"shift": torch.tensor(0.0)})
    (tmp_path / "shift.txt").write_text("3")
    moved = TeacherSpec.parse(f"my_teachers:build={tmp_path}/shift.txt")
    torch.testing.assert_close(ask(moved, manifest), ask(spec, manifest) + 3)
    assert stamp_teachers([moved], manifest, "float32").teachers[0].sha256 != stamp.sha256


def test_a_package_offers_a_teacher_by_an_entry_point(manifest: Manifest, my_package: Path) -> None:
    info = my_package / "my_teachers-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-teachers\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[audioset_distill.teachers]\nloudness = my_teachers:build\n")
    loaded = TeacherSpec.parse("loudness").load(manifest)
    assert (loaded.model_name, type(loaded.network).__name__) == ("loudness", "Loudness")


def test_classes_are_matched_by_name_or_id_and_others_left_out(manifest: Manifest) -> None:
    plain, shuffled = (ask(TeacherSpec.parse(f"my_teachers:{name}"), manifest) for name in ("build", "build_shuffled"))
    torch.testing.assert_close(shuffled[0], plain[0, 0] - torch.tensor([5.0, 4, 3, 2, 1]))


@pytest.mark.parametrize(
    ("builder", "kind", "complaint"),
    [
        ("nobody", UsageError, "has no attribute 'nobody'.*Name a function as my_package.module:function"),
        ("build_list", UsageError, "gives a list; a teacher is a torch.nn.Module"),
        ("build_bare", UsageError, "has no front_end and no sample_rate_hz and no input_seconds"),
        (
            "build_other",
            CheckpointError,
            r"no class called 'Sound 0', 'Sound 2'.* \(4 of the dataset's 5\).*bark",
        ),
        ("build_double", CheckpointError, r"has several classes called 'Sound 0' \(1 of the dataset's 5\)"),
        ("build_nameless", CheckpointError, r"gives \(1, 4\) for one clip, not logits of shape \(1, 5\)"),
        ("build_broken", CheckpointError, "fails on a silent clip of 32000 samples"),
        ("build_diverged", CheckpointError, "shift hold numbers that are not finite"),
        ("build_dividing", CheckpointError, "gives logits that are not finite for a silent clip"),
        ("build_refusing=x", CheckpointError, "its builder failed: this is no checkpoint of mine"),
    ],
)
def test_what_is_no_teacher_is_refused_before_the_run(
    manifest: Manifest, builder: str, kind: type[Exception], complaint: str
) -> None:
    with pytest.raises(kind, match=complaint):
        TeacherSpec.parse(f"my_teachers:{builder}").load(manifest)


def test_an_absent_package_is_named(manifest: Manifest) -> None:
    with pytest.raises(UsageError, match=r"No module named 'no_such_package'.*PYTHONPATH"):
        TeacherSpec.parse("no_such_package:build").load(manifest)


def test_probabilities_instead_of_logits_are_suspected(manifest: Manifest, caplog: pytest.LogCaptureFixture) -> None:
    TeacherSpec.parse("my_teachers:build_probabilities").load(manifest)
    assert "gives values from 0 to 1, like probabilities" in caplog.text


def test_stage_1_runs_a_foreign_teacher_beside_ours(
    manifest: Manifest, make_teacher: Callable[..., str], tmp_path: Path
) -> None:
    specs = tuple(TeacherSpec.parse(text) for text in ("my_teachers:build_shuffled", make_teacher("passt_tiny")))
    stamp = stamp_teachers(specs, manifest, "float32")
    labeller = ShardLabeller(
        LabellerConfig(
            data=str(manifest.location), store=str(tmp_path / "store"), teachers=specs, stamp=stamp, batch_size=2
        )
    )
    report = labeller.label_shard(manifest.shards[0])
    labeller.close()
    assert (report.clips, report.failed) == (3, 0)
    (part,) = (tmp_path / "store").glob("*.parquet")
    assert b"my_teachers:build_shuffled" in b"".join((pq.read_schema(part).metadata or {}).values())


@pytest.fixture(scope="module")
def hub_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny AST as Hugging Face saves it, with the classes in another order and one more."""
    transformers = pytest.importorskip("transformers")
    names = ["Bark", *(f"Sound {index}" for index in reversed(range(5)))]
    config = transformers.ASTConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        num_labels=6,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("hub") / "ast-tiny"
    model = transformers.ASTForAudioClassification(config)
    with torch.no_grad():
        model.classifier.dense.bias.copy_(torch.arange(6.0) - 9)
    model.save_pretrained(folder)
    transformers.ASTFeatureExtractor().save_pretrained(folder)
    return folder


def test_hugging_faces_classifier_teaches_from_a_folder(manifest: Manifest, hub_folder: Path) -> None:
    import transformers

    spec = TeacherSpec.parse(f"hf:ORG/ast-tiny={hub_folder}@0.5")
    loaded = spec.load(manifest)
    network: Any = loaded.network
    waveforms = torch.rand(2, 160_000) - 0.5
    with torch.inference_mode():
        ours = network(network.front_end(waveforms))
        extract = transformers.AutoFeatureExtractor.from_pretrained(hub_folder)
        theirs = transformers.AutoModelForAudioClassification.from_pretrained(hub_folder)
        inputs = extract(list(waveforms.numpy()), sampling_rate=16_000, return_tensors="pt")
        expected = theirs(**inputs).logits[:, [5, 4, 3, 2, 1]]
    torch.testing.assert_close(ours, expected)
    stamp = stamp_teachers([spec], manifest, "float32").teachers[0]
    assert (stamp.name, stamp.weight) == ("hf:ORG/ast-tiny", 0.5)
    assert stamp.sha256 == sha256_of_file(hub_folder / "model.safetensors")
    assert stamp.front_end.startswith("ASTFeatureExtractor(16000 Hz, settings ")


def test_a_model_that_was_never_trained_to_tag_is_refused(manifest: Manifest, tmp_path: Path) -> None:
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
    )
    transformers.Wav2Vec2Model(config).save_pretrained(tmp_path / "w2v")
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(tmp_path / "w2v")
    with pytest.raises(CheckpointError, match=r"its weights lack .*classifier.*fine-tune it first"):
        TeacherSpec.parse(f"hf:ORG/w2v={tmp_path}/w2v").load(manifest)


def test_other_classes_of_hugging_faces_are_refused(
    hub_folder: Path, build_dataset: Callable[..., Manifest], make_noises: Callable
) -> None:
    others = Vocabulary((LabelClass(0, "/t/0", "Sound 0"), LabelClass(1, "/t/1", "Meow")))
    manifest = build_dataset("cats", make_noises(1, 2), vocabulary=others)
    with pytest.raises(CheckpointError, match=r"knows no class called 'Meow' \(1 of the dataset's 2\); it knows Bark"):
        TeacherSpec.parse(f"hf:ORG/ast-tiny={hub_folder}").load(manifest)


def test_a_folder_without_settings_is_named(manifest: Manifest, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no config\.json and no preprocessor_config\.json"):
        TeacherSpec.parse(f"hf:ORG/x={tmp_path}").load(manifest)


def test_without_the_package_transformers_the_user_is_told(
    manifest: Manifest, hub_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # how Python marks what can't be imported
    with pytest.raises(UsageError, match="pip install transformers"):
        TeacherSpec.parse(f"hf:ORG/ast-tiny={hub_folder}").load(manifest)


def test_equal_state_dicts_have_equal_hashes() -> None:
    layer = nn.Linear(2, 3)
    same = dict(reversed(layer.state_dict().items()))
    assert sha256_of_tensors(layer.state_dict()) == sha256_of_tensors(same)
    same["bias"] = same["bias"].double()
    assert sha256_of_tensors(layer.state_dict()) != sha256_of_tensors(same)
    assert sha256_of_tensors({"a": torch.tensor(1.5), "b": torch.zeros(0)})


@pytest.fixture
def folder_with_code(hub_folder: Path, tmp_path: Path) -> Path:
    """The tiny AST as a class that only code beside it knows; what that code is run for, it writes down."""
    folder = tmp_path / "own-class"
    shutil.copytree(hub_folder, folder)
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"model_type": "own", "architectures": ["Own"]}
    settings["auto_map"] = {"AutoConfig": "own_model.OwnConfig", "AutoModelForAudioClassification": "own_model.Own"}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "own_model.py").write_text(
        "from pathlib import Path\n"
        "from transformers import ASTConfig, ASTForAudioClassification\n"
        f"Path({str(tmp_path / 'ran')!r}).touch()\n"
        "class OwnConfig(ASTConfig):\n    model_type = 'own'\n"
        "class Own(ASTForAudioClassification):\n    config_class = OwnConfig\n"
    )
    return folder


def test_code_of_a_repository_is_run_for_a_teacher_that_is_trusted_by_name_alone(
    manifest: Manifest, folder_with_code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    text = f"hf:ORG/own={folder_with_code}"
    [spec] = parse_teachers([text])
    with pytest.raises(UsageError, match=r"own_model\.py, which came .* would have to be run.*--trust-remote-code"):
        spec.load(manifest)
    assert not (tmp_path / "ran").exists()
    [trusted] = parse_teachers([text], ["ORG/own"])
    assert trusted.load(manifest).model_name == "hf:ORG/own"
    assert (tmp_path / "ran").exists()


def test_trust_in_what_is_no_teacher_is_refused() -> None:
    with pytest.raises(UsageError, match="--trust-remote-code ORG/other: no --teacher is called hf:ORG/other"):
        parse_teachers(["hf:ORG/own", "passt_s"], ["ORG/other"])
