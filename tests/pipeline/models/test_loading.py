"""A checkpoint may be a file, a folder of Hugging Face's, or the name of what was released, which is fetched once."""

import wave
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from file_server import Fault, FileServer
from safetensors.torch import save_file
from torch import nn

import student
import teacher
from pipeline import cli
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.vocabulary import Vocabulary, audioset_vocabulary
from pipeline.errors import CheckpointError, UsageError
from pipeline.labelling.teacher_spec import TeacherSpec, stamp_teachers
from pipeline.models import fetching
from pipeline.models.loading import build_for_training, check_finite, load_model, named_checkpoint, open_weights
from pipeline.models.weights import sha256_of_file
from pipeline.training.checkpoints import save_weights
from student.registry import _CARD_BY_NAME as STUDENTS
from teacher.registry import CARDS as TEACHERS


@pytest.fixture(autouse=True)
def torch_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "torch"


Release = Callable[[str], bytes]


@pytest.fixture
def release(file_server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Release:
    """Returns `release(name)`: the local server has weights under a registered name from then on."""

    def make(name: str) -> bytes:
        package: Any = student if name.startswith("mn") else teacher
        torch.manual_seed(1)
        torch.save(package.create_model(name).state_dict(), tmp_path / "source.pt")
        file_server.files[f"/{name}.pt"] = (tmp_path / "source.pt").read_bytes()
        cards = STUDENTS if package is student else TEACHERS
        card = replace(package.model_card(name), weights_url=file_server.url(f"/{name}.pt"))
        monkeypatch.setitem(cards, name, card)  # pyright: ignore[reportArgumentType]
        return file_server.files[f"/{name}.pt"]

    return make


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    with wave.open(str(tmp_path / "sound.wav"), "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(32_000)
        writer.writeframes(torch.randint(-9_000, 9_000, (64_000,), dtype=torch.int16).numpy().tobytes())
    return tmp_path / "sound.wav"


def test_tag_fetches_what_was_released_once(
    file_server: FileServer, release: Release, sound: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    release("mn01_as")
    command = ["tag", str(sound), "--checkpoint", "mn01_as", "--json"]
    assert cli.run(command) == 0
    first = capsys.readouterr().out
    assert cli.run([*command, "--offline"]) == 0
    assert capsys.readouterr().out == first
    assert len(file_server.asked) == 1


@pytest.mark.parametrize(
    ("trouble", "complaint"),
    [
        ("404", "the server answered 404"),
        ("503", "the server answered 503"),
        ("cut", "the connection broke after"),
        ("no network", "can't be reached"),
        ("offline", "--offline or HF_HUB_OFFLINE forbids fetching it"),
        ("html", "neither torch nor safetensors files do"),
        ("full disk", "but only"),
    ],
)
def test_each_trouble_with_a_download_is_one_line_and_exit_code_1(
    trouble: str,
    complaint: str,
    file_server: FileServer,
    release: Release,
    sound: Path,
    torch_home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    release("mn01_as")
    monkeypatch.setattr(fetching.Patience, "__init__", _hasty(fetching.Patience.__init__))
    command = ["tag", str(sound), "--checkpoint", "mn01_as"]
    match trouble:
        case "404":
            file_server.files.clear()
        case "503":
            file_server.faults = [Fault(status=503)] * 9
        case "cut":
            file_server.faults = [Fault(cut_after=100_000)] + [Fault(cut_after=0)] * 9
        case "no network":
            card = replace(student.model_card("mn01_as"), weights_url="http://127.0.0.1:9/mn01_as.pt")
            monkeypatch.setitem(STUDENTS, "mn01_as", card)  # pyright: ignore[reportArgumentType]
        case "offline":
            command.append("--offline")
        case "html":
            file_server.files["/mn01_as.pt"] = b"<html>log in</html>"
        case "full disk":
            file_server.faults = [Fault(length_error=10**16)]
    assert cli.run(command) == 1
    shown = capsys.readouterr()
    (error,) = [line for line in shown.err.splitlines() if line.startswith("error: ")]
    assert complaint in error
    assert "Traceback" not in shown.err
    assert not list(torch_home.rglob("mn01_as.pt"))

    if trouble in ("503", "cut", "full disk"):  # the same command goes on
        file_server.faults.clear()
        assert cli.run(command) == 0
        if trouble == "cut":
            assert file_server.asked[-1].first_byte == 100_000


def _hasty(init: Callable[..., None]) -> Callable[..., None]:
    return lambda self, **settings: init(self, **{"tries": 2, "first_wait_seconds": 0.01, **settings})


def test_a_teacher_by_its_name_alone_is_fetched_and_stamped(
    release: Release, build_dataset: Callable[..., Manifest], make_noises: Callable, file_server: FileServer
) -> None:
    content = release("ced_tiny")
    manifest = build_dataset("data", make_noises(2, 5), vocabulary=audioset_vocabulary())
    spec = TeacherSpec.parse("ced_tiny@2")
    stamp = stamp_teachers([spec], manifest, "float32")
    (Path("here")).write_bytes(content)
    assert (stamp.teachers[0].name, stamp.teachers[0].weight) == ("ced_tiny", 2.0)
    assert stamp.teachers[0].sha256 == sha256_of_file(Path("here"))
    Path("ced_tiny").write_text("a file that happens to have the name")
    assert spec.load(manifest).sha256 == stamp.teachers[0].sha256
    assert len(file_server.asked) == 1


def test_offline_travels_with_a_teacher(
    release: Release, build_dataset: Callable[..., Manifest], make_noises: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    release("ced_tiny")
    manifest = build_dataset("data", make_noises(2, 5), vocabulary=audioset_vocabulary())
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    spec = TeacherSpec.parse("ced_tiny")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # as on another machine
    with pytest.raises(CheckpointError, match="forbids fetching"):
        spec.load(manifest)


def test_create_model_takes_the_function_that_fetches(release: Release, tmp_path: Path) -> None:
    release("mn01_as")
    asked = []

    def fetch(url: str) -> Path:
        asked.append(url)
        return tmp_path / "source.pt"

    model = student.create_model("mn01_as", pretrained=True, fetch=fetch, num_classes=3)
    assert asked == [student.model_card("mn01_as").weights_url]
    assert model(torch.zeros(1, 1, 128, 64)).shape == (1, 3)


@pytest.mark.parametrize("name", ["mn01_as", "ced_tiny"])
def test_timms_pretrained_fetches_by_itself(name: str, release: Release, file_server: FileServer) -> None:
    release(name)
    for _ in range(2):
        model = timm.create_model(name, pretrained=True)
    source = torch.load("source.pt", weights_only=True)
    assert all(torch.equal(value, source[key]) for key, value in model.state_dict().items())
    assert len(file_server.asked) == 1


@pytest.mark.parametrize("name", ["mn01_as", "ced_tiny"])
def test_timms_pretrained_fetches_as_the_installation_says(
    name: str, release: Release, file_server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release(name)
    installed = tmp_path / "site/audioset_distill_like-1.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: audioset-distill-like\nVersion: 1\n")
    entry = "[audioset_distill.fetch]\ncache = pipeline.models.weights_cache:fetch_path\n"
    (installed / "entry_points.txt").write_text(entry)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    file_server.faults = [Fault(cut_after=100_000)]  # torch.hub would give up
    timm.create_model(name, pretrained=True)
    assert [asked.first_byte for asked in file_server.asked] == [0, 100_000]
    assert list((tmp_path / "torch").rglob("*.sha256"))


def test_a_name_without_release_or_without_meaning_says_so() -> None:
    with pytest.raises(CheckpointError, match=r"mn10: no such file, and no weights were released as mn10"):
        load_model("mn10")
    with pytest.raises(
        CheckpointError, match=r"mn10_sa: no such file, and no model is called that; did you mean mn10_as"
    ):
        load_model("mn10_sa")
    with pytest.raises(ValueError, match="no weights were released as mn10; those with weights end in _as or _im"):
        timm.create_model("mn10", pretrained=True)


def test_a_file_of_that_name_wins(tmp_path: Path) -> None:
    Path("mn01_as").write_bytes(b"local")
    with open_weights("mn01_as") as weights:
        assert weights.path.read_bytes() == b"local"
        assert weights.released_as is None


def test_a_folder_of_hugging_faces_gives_its_weights(tmp_path: Path) -> None:
    folder = tmp_path / "ast"
    folder.mkdir()
    save_file(teacher.create_model("ast_tiny", num_classes=527).state_dict(), folder / "model.safetensors")
    loaded = load_model(str(folder), model="ast_tiny")
    assert loaded.sha256 == sha256_of_file(folder / "model.safetensors")


def test_imagenets_weights_have_names_too(file_server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(student.IMAGENET_WEIGHTS, "mobilenet_v3_large", file_server.url("/net.pth"))  # pyright: ignore
    torch.save({"weight": torch.zeros(1)}, "net.pth")
    file_server.files["/net.pth"] = Path("net.pth").read_bytes()
    with open_weights("mobilenet_v3_large") as weights:
        assert (weights.path.name, weights.released_as) == ("net.pth", "mobilenet_v3_large")


def test_a_student_is_loaded_without_batch_norms_and_says_the_same(tmp_path: Path, five_classes: Vocabulary) -> None:
    model = student.create_model("mn01", num_classes=5)
    images = torch.randn(2, 1, 128, 100)
    for _ in range(3):
        model.train()(images)  # moves the statistics that are folded away
    metadata = {"stage": "student", "model": "mn01", "kwargs": {}, "classes": 5}
    metadata |= {"vocabulary_sha256": five_classes.sha256, "vocabulary": five_classes.to_csv_bytes().decode()}
    save_weights(tmp_path / "mn01.safetensors", model.state_dict(), metadata)
    loaded = load_model(str(tmp_path / "mn01.safetensors")).network
    assert not any(isinstance(module, nn.BatchNorm2d) for module in loaded.modules())
    with torch.inference_mode():
        expected = model.eval()(images)
        torch.testing.assert_close(loaded(images), expected, atol=float(1e-4 * expected.std()), rtol=0)


# Files of other projects, which say nothing of themselves.


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("mn10", {"width_mult": 0.13}),
    ("mn01", {"se_dims": "f"}),
    ("mn01", {"se_dims": "none"}),
    ("mn01", {"se_dims": "cf", "se_agg": "add", "se_r": 2}),
    ("mn01", {"head_type": "multihead_attention_pooling", "multihead_attention_heads": 2}),
    ("mn01", {"head_type": "fully_convolutional", "strides": [2, 2, 2, 1]}),
    ("mn01", {"dilated": True}),
    ("mn01", {"reduced_tail": True}),
    ("mn01", {"resample_rate": 16_000, "n_fft": 512, "window_size": 400, "hopsize": 160, "fmin": 50, "n_mels": 64}),
    ("mn01", {"fmax": 12_000, "fmin_aug_range": 1, "fmax_aug_range": 1}),
    ("dymn04", {"width_mult": 0.1, "use_dy_blocks": "replace_se", "T_max": 1.0}),
]


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_a_plain_file_of_any_variant_loads_by_its_options(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = student.create_model(name, **options).eval()
    torch.save(model.state_dict(), tmp_path / "theirs.pt")
    loaded = load_model(f"{name}={tmp_path}/theirs.pt", options=options)
    network: Any = loaded.network
    sound = 0.1 * torch.randn(2, loaded.sample_rate_hz)
    with torch.inference_mode():
        expected, found = model(model.front_end(sound)), network(network.front_end(sound))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert loaded.sample_rate_hz == options.get("resample_rate", 32_000)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "strides (2, 2, 2, 2), dilated False, front_end FrontEndConfig(sample_rate_hz=32000, mels=128"),
        ({"strides": [2, 2, 2, 2]}, "has it: dilated False, front_end FrontEndConfig("),
        ({"n_mels": 128}, "has it: strides (2, 2, 2, 2), dilated False. Set it with --model-options"),
    ],
)
def test_what_a_plain_file_does_not_tell_is_said_with_what_is_taken(
    options: dict[str, Any], told: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(student.create_model("mn01").state_dict(), tmp_path / "theirs.pt")
    load_model(str(tmp_path / "theirs.pt"), model="mn01_as", options=options)
    assert told in caplog.text


def test_what_is_known_is_not_said(tmp_path: Path, caplog: pytest.LogCaptureFixture, release: Release) -> None:
    torch.save(student.create_model("mn01").state_dict(), tmp_path / "mn01_as_mAP_298.pt")
    load_model("mn01_as_mAP_298.pt", model="mn01_as")
    load_model("mn01=mn01_as_mAP_298.pt")  # the width of the same network
    release("mn01_as")
    load_model("mn01_as")
    everything = {"strides": [2, 2, 2, 2], "dilated": False, "n_mels": 128}
    torch.save(student.create_model("mn01").state_dict(), tmp_path / "theirs.pt")
    load_model("mn01=theirs.pt", options=everything)
    assert "holds no trace" not in caplog.text


@pytest.mark.parametrize(
    ("file", "named", "released"),
    [("mn10_as_hop_15_mAP_463.pt", "mn10_as", "mn10_as_hop_15"), ("dymn04_as.pt", "dymn04", "dymn04_as")],
)
def test_a_file_that_was_released_as_another_twin_is_refused(
    file: str, named: str, released: str, tmp_path: Path
) -> None:
    torch.save(student.create_model(released).state_dict(), tmp_path / file)
    with pytest.raises(CheckpointError, match=f"was released as {released}, which fits {named} but computes something"):
        load_model(file, model=named)
    assert load_model(file, model=named, options={"dropout": 0.0}).model_name == named


def test_a_lightning_checkpoint_is_heard_as_the_network_inside(tmp_path: Path) -> None:
    state = student.create_model("mn01").state_dict()
    torch.save(state, "plain.pt")
    inside = {f"model.{key}": value for key, value in state.items()}
    torch.save({"state_dict": inside, "epoch": 9, "global_step": 7, "loops": {}, "callbacks": {}}, "epoch=9.ckpt")
    image = torch.randn(1, 1, 128, 64)
    with torch.inference_mode():
        plain, wrapped = (load_model(f"mn01={file}").network(image) for file in ("plain.pt", "epoch=9.ckpt"))
    assert torch.equal(plain, wrapped)


def test_a_name_before_the_file_is_told_from_a_file_with_such_a_name(tmp_path: Path) -> None:
    torch.save(student.create_model("mn01").state_dict(), "a.pt")
    assert named_checkpoint("mn01=a.pt") == ("mn01", "a.pt")
    assert named_checkpoint("a.pt") == (None, "a.pt")
    assert named_checkpoint("passt_s=s3://me@host/x=1/b.pt") == ("passt_s", "s3://me@host/x=1/b.pt")
    assert named_checkpoint("https://host/a.pt?name=mn01") == (None, "https://host/a.pt?name=mn01")
    assert named_checkpoint("epoch=9.ckpt") == (None, "epoch=9.ckpt"), "nothing is called that: perhaps a lost file"
    Path("mn01=a.pt").write_bytes(Path("a.pt").read_bytes())
    assert named_checkpoint("mn01=a.pt") == (None, "mn01=a.pt")
    with pytest.raises(UsageError, match="no student or teacher is called mn99x"):
        named_checkpoint("mn99x=a.pt")


def test_weights_of_ours_under_another_name_are_refused(tmp_path: Path, five_classes: Vocabulary) -> None:
    about = {"classes": 5, "vocabulary_sha256": five_classes.sha256, "vocabulary": five_classes.to_csv_bytes().decode()}
    weights = student.create_model("mn01", num_classes=5).state_dict()
    save_weights(Path("ours.safetensors"), weights, {"stage": "student", "model": "mn01", "kwargs": {}, **about})
    with pytest.raises(CheckpointError, match="holds the weights of mn01, not of mn02"):
        load_model("mn02=ours.safetensors")
    assert load_model("mn01=ours.safetensors").vocabulary == five_classes


def test_classes_of_a_plain_file_can_be_named(
    tmp_path: Path, five_classes: Vocabulary, build_dataset: Callable[..., Manifest], make_noises: Callable
) -> None:
    torch.save(student.create_model("mn01", num_classes=5).state_dict(), "theirs.pt")
    with pytest.raises(CheckpointError, match="is not for 527 classes; name its own with --classes"):
        load_model("mn01=theirs.pt")
    assert load_model("mn01=theirs.pt", classes=five_classes).vocabulary == five_classes
    manifest = build_dataset("data", make_noises(2, 5))
    assert load_model("mn01=theirs.pt", manifest, classes=five_classes).vocabulary == five_classes
    with pytest.raises(UsageError, match=r"--classes: has 527 classes with hash .* but .*data has 5"):
        load_model("mn01=theirs.pt", manifest, classes=audioset_vocabulary())


def spoiled(model: nn.Module, value: float) -> dict[str, torch.Tensor]:
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    last = [key for key, tensor in state.items() if tensor.is_floating_point()][-1]
    state[last].view(-1)[0] = value
    return state


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["mn01_as", "passt_tiny"])
def test_weights_that_are_not_finite_are_refused_by_whoever_loads_them(tmp_path: Path, name: str, value: float) -> None:
    package: Any = student if name.startswith("mn") else teacher
    torch.save(spoiled(package.create_model(name), value), tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match=r"bad\.pt: \S+ hold numbers that are not finite"):
        load_model(str(tmp_path / "bad.pt"), model=name)
    with pytest.raises(CheckpointError, match=r"bad\.pt: \S+ hold numbers that are not finite"):
        build_for_training(package, name, str(tmp_path / "bad.pt"), seed=0)


def test_statistics_that_are_not_finite_are_refused_too(tmp_path: Path) -> None:
    state = student.create_model("mn01_as").state_dict()
    state["features.0.1.running_var"][0] = torch.inf
    torch.save(state, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match=r"features\.0\.1\.running_var hold numbers"):
        load_model(str(tmp_path / "bad.pt"), model="mn01_as")


def test_large_weights_are_numbers_all_the_same() -> None:
    check_finite({"large": torch.full((4,), 3e38), "whole": torch.ones(2, dtype=torch.int64)}, "here")


@pytest.mark.parametrize("location", ["mine.onnx", "runs/Mine.PT2", "mn04=mine.pt2", "https://host/mine.onnx?token=1"])
def test_an_exported_program_is_no_checkpoint(location: str) -> None:
    with pytest.raises(CheckpointError, match="an exported program, which is run and not loaded"):
        load_model(location)


def test_commands_say_that_the_checkpoint_is_at_fault(
    tmp_path: Path, sound: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(spoiled(student.create_model("mn01_as"), float("nan")), tmp_path / "bad.pt")
    assert cli.run(["tag", str(sound), "--checkpoint", str(tmp_path / "bad.pt"), "--model", "mn01_as"]) == 1
    assert "bad.pt: classifier.5.bias hold numbers that are not finite" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["weights.pt", "weights.bin", "weights"])
def test_weights_of_ours_are_known_under_any_name(tmp_path: Path, five_classes: Vocabulary, name: str) -> None:
    metadata = {
        "stage": "student",
        "model": "mn01",
        "kwargs": {},
        "classes": len(five_classes),
        "vocabulary_sha256": five_classes.sha256,
        "vocabulary": five_classes.to_csv_bytes().decode(),
    }
    torch.manual_seed(0)
    save_weights(tmp_path / "x.safetensors", student.create_model("mn01", num_classes=5).state_dict(), metadata)
    (tmp_path / "x.safetensors").rename(tmp_path / name)
    loaded = load_model(str(tmp_path / name))
    assert (loaded.model_name, loaded.vocabulary) == ("mn01", five_classes)


@pytest.mark.parametrize("content", [b"", b"<html>please log in</html>"])
def test_what_is_no_file_of_weights_is_not_asked_for_its_model(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: no file of weights: it begins with"):
        load_model(str(tmp_path / "x.safetensors"))
