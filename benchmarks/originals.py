"""The projects that teachers come from, run beside ours: for golden files, and to compare speed.

    python -m benchmarks.originals --checkouts DIR                      # compares ours with each, at full depth
    python -m benchmarks.originals --checkouts DIR --write tests/teacher/golden   # two blocks, as the tests read them

DIR holds checkouts of the originals, which are run as they are (`SOURCES` says which commit): `EAT`
(cwx-worst-one/EAT), `beats` (that folder of microsoft/unilm), `m2d` (nttcslab/m2d) and `audiossl`
(Audio-WestlakeU/audiossl); the last two need nnAudio and einops. What originals import and inference does not need,
such as fairseq and omegaconf, is stood in for.
Weights are filled by the formula in `../shared/golden/fill.py`, under the names of a release.
"""

import argparse
import dataclasses
import functools
import hashlib
import importlib
import importlib.machinery
import json
import sys
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torchaudio
from torch import Tensor, nn
from torch.nn import functional as F

import teacher

SECONDS = (1.0, 4.0, 9.99, 10.0, 17.0, 30.0)
SOURCES = {
    "EAT": "github.com/cwx-worst-one/EAT, 06c1c34e2afd8dc35297e6d3815d31dbeec9d372",
    "beats": "github.com/microsoft/unilm, beats/, 768a3c873f598bb9b4d4dfb9267b099e35f8fe56",
    "m2d": "github.com/nttcslab/m2d, f0c4128d4e89b1ab4e303f03141067b34aadf128",
    "audiossl": "github.com/Audio-WestlakeU/audiossl, ec3a14db086eaccfb69513e4a90fad89bf992e1f",
}
CLASSES = 40
"""Of golden files; enough to tell logits apart."""


class Original(ABC):
    """One network as its authors wrote it, in evaluation mode."""

    project: str
    """Its checkout's name."""

    network: nn.Module

    @abstractmethod
    def __init__(self, checkouts: Path, card: teacher.ModelCard, num_classes: int) -> None:
        """Build it in the size of the card's `config`."""

    @abstractmethod
    def features(self, clip: Tensor) -> Tensor:
        """(samples,) → its features, (1, …), as its own script computes them."""

    @abstractmethod
    def logits(self, features: Tensor) -> Tensor:
        """Features → (1, classes)."""


class OriginalEAT(Original):
    """`inference/inference.py` on a fine-tuned `MaeImageClassificationModel`; SSLAM's is the same, line for line."""

    project = "EAT"

    def __init__(self, checkouts: Path, card: teacher.ModelCard, num_classes: int) -> None:
        config = card.config
        with _stand_ins("fairseq", "omegaconf"), _hashable_dataclasses():
            package = _package(checkouts / "EAT" / "models", "original_eat")
            pretraining = importlib.import_module(f"{package}.EAT_pretraining")
            classification = importlib.import_module(f"{package}.EAT_audio_classification")
            images = importlib.import_module(f"{package}.images")
            image = _settings(
                images.D2vImageConfig,
                in_chans=1,
                embed_dim=config.embed_dim,
                prenet_depth=0,
                num_extra_tokens=1,
                init_extra_token_zero=False,
                num_alibi_heads=config.num_heads,
                decoder=None,
            )
            model = _settings(
                pretraining.Data2VecMultiConfig,
                _name="data2vec_multi",
                depth=config.depth,
                embed_dim=config.embed_dim,
                num_heads=config.num_heads,
                encoder_dropout=0,
                post_mlp_drop=0,
                attention_dropout=0,
                modalities=_Settings(image=image),
                skip_ema=True,
            )

            def build(settings: Any, **_: object) -> nn.Module:
                return pretraining.Data2VecMultiModel(settings, [pretraining.Modality.IMAGE], skip_ema=True)

            task = types.SimpleNamespace(build_model=build)
            sys.modules["fairseq"].tasks = types.SimpleNamespace(setup_task=lambda _: task)  # pyright: ignore[reportAttributeAccessIssue]
            classification.__dict__["tasks"] = sys.modules["fairseq"].tasks
            settings = _settings(
                classification.MaeImageClassificationConfig,
                pretrained_model_args=_Settings(task=_Settings(), model=model),
                num_classes=num_classes,
                audio_mae=True,
                prediction_mode=classification.PredictionMode.CLS_TOKEN,
            )
            self.network = classification.MaeImageClassificationModel(settings).eval()

    def features(self, clip: Tensor) -> Tensor:
        mel = torchaudio.compliance.kaldi.fbank(
            (clip - clip.mean())[None],
            htk_compat=True,
            sample_frequency=16000,
            use_energy=False,
            window_type="hanning",
            num_mel_bins=128,
            dither=0.0,
            frame_shift=10,
        )
        mel = F.pad(mel[:1024], (0, 0, 0, max(0, 1024 - len(mel))))
        return ((mel - -4.268) / (4.569 * 2))[None, None]

    def logits(self, features: Tensor) -> Tensor:
        return self.network(features)


class OriginalBEATs(Original):
    """`BEATs.extract_features` of one clip, with the settings that released checkpoints hold.

    It ends in probabilities; the logits that go into its sigmoid are caught.
    """

    project = "beats"

    def __init__(self, checkouts: Path, card: teacher.ModelCard, num_classes: int) -> None:
        config = card.config
        sys.path.insert(0, str(checkouts / "beats"))
        try:
            module = importlib.import_module("BEATs")
        finally:
            sys.path.remove(str(checkouts / "beats"))
        settings = module.BEATsConfig(
            {
                "input_patch_size": 16,
                "encoder_layers": config.depth,
                "encoder_embed_dim": config.embed_dim,
                "encoder_ffn_embed_dim": 4 * config.embed_dim,
                "encoder_attention_heads": config.num_heads,
                "dropout": 0.0,
                "attention_dropout": 0.0,
                "relative_position_embedding": True,
                "max_distance": 800,
                "gru_rel_pos": True,
                "deep_norm": True,
                "layer_wise_gradient_decay_ratio": 0.6,
                "finetuned_model": True,
                "predictor_dropout": 0.0,
                "predictor_class": num_classes,
            }
        )
        self.network = module.BEATs(settings).eval()

    def features(self, clip: Tensor) -> Tensor:
        return cast("Any", self.network).preprocess(clip[None])

    def logits(self, features: Tensor) -> Tensor:
        network, found = cast("Any", self.network), []
        network.preprocess = lambda *_, **__: features
        hook = network.predictor.register_forward_hook(lambda *parts: found.append(parts[2].mean(dim=1)))
        try:
            probabilities, _ = network.extract_features(features)
        finally:
            hook.remove()
            del network.preprocess
        torch.testing.assert_close(found[0].sigmoid(), probabilities)
        return found[0]


class OriginalM2D(Original):
    """`examples/portable_m2d.py` with the head of a release that was fine-tuned on AudioSet."""

    project = "m2d"

    def __init__(self, checkouts: Path, card: teacher.ModelCard, num_classes: int) -> None:
        config = card.config
        package = _package(checkouts / "m2d" / "examples", "original_m2d")
        module = importlib.import_module(f"{package}.portable_m2d")
        patch = [config.patch, config.patch]
        vit = module.LocalViT(
            in_chans=1,
            img_size=[config.mels, config.frames],
            patch_size=patch,
            embed_dim=config.embed_dim,
            depth=config.depth,
            num_heads=config.num_heads,
            norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
        )
        settings = types.SimpleNamespace(
            sr=f"{card.front_end.sample_rate_hz // 1000}k", input_size=[config.mels, config.frames], patch_size=patch
        )
        settings.flat_features = True
        runtime: Any = module.PortableM2D.__new__(module.PortableM2D)
        nn.Module.__init__(runtime)
        runtime.cfg, runtime.backbone = settings, vit
        runtime.head_norm = nn.BatchNorm1d(config.embed_dim, affine=False)
        runtime.head = nn.Linear(config.embed_dim, num_classes)
        runtime.to_spec = module.get_to_melspec(settings)
        self.runtime = runtime.eval()
        names = {f"module.ar.runtime.backbone.{key}": value for key, value in vit.named_parameters()}
        self.network = _Named(
            {
                **names,
                "module.head.norm.running_mean": runtime.head_norm.running_mean,
                "module.head.norm.running_var": runtime.head_norm.running_var,
                "module.head.mlp.mlp.0.weight": runtime.head.weight,
                "module.head.mlp.mlp.0.bias": runtime.head.bias,
            }
        )

    def features(self, clip: Tensor) -> Tensor:
        return self.runtime.to_log_mel_spec(clip[None])

    def logits(self, features: Tensor) -> Tensor:
        runtime = self.runtime
        runtime.cfg.mean, runtime.cfg.std = runtime.backbone.norm_stats
        runtime.to_normalized_feature = lambda _: runtime.normalize_batch(features)
        return runtime(features)


class _Named(nn.Module):
    """Tensors under a release's names, which are those of another class than the one that runs them."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        super().__init__()
        self.tensors = tensors

    def state_dict(self, *_: object, **__: object) -> Any:
        return dict(self.tensors)

    def load_state_dict(self, state_dict: Mapping[str, Any], *_: object, **__: object) -> Any:
        for key, value in state_dict.items():
            self.tensors[key].data.copy_(value)


class OriginalATST(Original):
    """`FineTuningPLModule` over `PretrainedEncoderPLModule` with the settings of its shell scripts for AudioSet."""

    project = "audiossl"
    method, name = "atstframe", "FrameAST"

    def __init__(self, checkouts: Path, card: teacher.ModelCard, num_classes: int) -> None:
        config = card.config
        sys.path.insert(0, str(checkouts / "audiossl"))
        absent = ("audiossl.datasets", "fairseq", "pytorch_lightning", "sklearn", "torchmetrics")
        with _stand_ins(*absent):
            downstream = importlib.import_module(f"audiossl.methods.{self.method}.downstream.model")
            transform = importlib.import_module(f"audiossl.methods.{self.method}.downstream.transform")
        encoder = getattr(downstream.audio_transformer, self.name)(
            patch_h=64,
            patch_w=4,
            embed_dim=config.embed_dim,
            depth=config.depth,
            num_heads=config.num_heads,
            qkv_bias=False,
            norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
        )
        encoder.hyper_param = {"anchor_len": 10.0}
        pretrained = downstream.PretrainedEncoderPLModule(encoder, 6.0, 1)
        network: Any = nn.Module()
        network.encoder = pretrained
        network.head = downstream.LinearHead(pretrained.embed_dim, num_classes, use_norm=True, affine=False)
        self.network = network.eval()
        self.transform = transform.FinetuneEvalTransform()

    def features(self, clip: Tensor) -> Tensor:
        return self.transform(clip[None])[0][None]

    def logits(self, features: Tensor) -> Tensor:
        network = cast("Any", self.network)
        pooled, _ = network.encoder(((features, torch.tensor([features.shape[-1]])), None))
        return network.head(pooled)


class OriginalATSTClip(OriginalATST):
    """The same of ATST-Clip."""

    method, name = "atst", "AST"


ORIGINALS: Mapping[str, type[Original]] = {
    "EAT": OriginalEAT,
    "BEATs": OriginalBEATs,
    "M2D": OriginalM2D,
    "ATSTFrame": OriginalATST,
    "ATSTClip": OriginalATSTClip,
}
"""By the name of the class of ours that does the same."""

GOLDEN_NAMES = ("eat_base", "eat_large", "beats", "m2d", "m2d_32khz", "atst_frame_base", "atst_clip_base")


class _Settings(dict):
    """Settings that are read as attributes and as items, as omegaconf's are."""

    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__


def _settings(kind: type, **chosen: object) -> _Settings:
    """Returns the defaults of a dataclass of settings, and what was chosen instead."""
    found = _Settings()
    for field in dataclasses.fields(kind):
        has_default = field.default is not dataclasses.MISSING
        found[field.name] = field.default if has_default else None
    return _Settings({**found, **chosen})


class _StandIn(types.ModuleType):
    """A package that isn't installed: every name in it is a class that does nothing, a decorator or a base."""

    __path__ = []  # noqa: RUF012 (a package's own attribute)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in {"BaseFairseqModel", "LightningModule"}:
            return nn.Module
        if name == "LayerNorm":
            return nn.LayerNorm
        if name in {"register_model", "open_dict"}:
            return _decorator if name == "register_model" else _nothing
        if name == "init_bert_params":
            return lambda module: None
        if name in {"II", "MISSING"}:
            return (lambda _: None) if name == "II" else None
        return type(name, (), {})


def _decorator(*_: object, **__: object) -> Callable[[Any], Any]:
    return lambda kind: kind


@contextmanager
def _nothing(_: object) -> Iterator[None]:
    yield


@contextmanager
def _stand_ins(*packages: str) -> Iterator[None]:
    """Stand in for packages, with all their modules, while an original is imported and built."""

    class Finder:
        @staticmethod
        def find_spec(name: str, path: object = None, target: object = None) -> Any:
            if any(f"{name}.".startswith(f"{package}.") for package in packages):
                return importlib.machinery.ModuleSpec(name, Finder, is_package=True)  # pyright: ignore[reportArgumentType]
            return None

        @staticmethod
        def create_module(spec: Any) -> types.ModuleType:
            return _StandIn(spec.name)

        @staticmethod
        def exec_module(module: types.ModuleType) -> None:
            pass

    sys.meta_path.insert(0, Finder)  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        sys.meta_path.remove(Finder)  # pyright: ignore[reportArgumentType]


@contextmanager
def _hashable_dataclasses() -> Iterator[None]:
    """Let dataclasses be defaults of dataclasses, as Python allowed before 3.11."""
    original = dataclasses.dataclass
    dataclasses.dataclass = lambda kind=None, **options: (  # pyright: ignore[reportAttributeAccessIssue]
        original(kind, **options, unsafe_hash=True)
        if kind is not None
        else lambda kind: original(kind, **options, unsafe_hash=True)
    )
    try:
        yield
    finally:
        dataclasses.dataclass = original


def _package(folder: Path, name: str) -> str:
    """Make a folder importable as a package."""
    if not folder.is_dir():
        raise SystemExit(f"{folder}: no such folder; --checkouts is where {', '.join(SOURCES.values())} lie")
    package = types.ModuleType(name)
    package.__path__ = [str(folder)]
    sys.modules[name] = package
    return name


def read_formula(shared: Path) -> types.ModuleType:
    """Returns the module that fills weights and makes waveforms."""
    sys.path.insert(0, str(shared / "golden"))
    return importlib.import_module("fill")


def fill_network(network: nn.Module, formula: types.ModuleType) -> dict[str, list[int]]:
    """Fill a network's weights by the formula; returns the shapes under their names."""
    state = network.state_dict()
    shapes = {key: list(value.shape) for key, value in state.items()}
    filled = formula.fill_state_dict(shapes)
    network.load_state_dict({key: torch.from_numpy(value).to(state[key].dtype) for key, value in filled.items()})
    return shapes


@torch.inference_mode()
def compare(name: str, original: Original, formula: types.ModuleType, num_classes: int, **size: Any) -> dict[str, Any]:
    """Run ours beside an original on a clip of each length; returns what a golden file holds."""
    shapes = fill_network(original.network, formula)
    state = {key: value.clone() for key, value in original.network.state_dict().items()}
    model = teacher.create_model(name, state, num_classes=num_classes, **size).eval()
    arrays: dict[str, np.ndarray] = {}
    for seconds in SECONDS:
        clip = torch.from_numpy(formula.waveform(seconds, model.sample_rate_hz, 0))
        theirs_features = original.features(clip)
        theirs = original.logits(theirs_features)
        lengths = torch.tensor([len(clip)])
        features = model.front_end(clip[None], lengths=lengths)
        frames = model.front_end.frames(lengths)
        ours = model(features, **({} if frames is None else {"frames": frames}))
        spread = theirs.std().item()
        arrays[f"logits_{seconds:g}s"] = theirs[0].numpy()
        arrays[f"features_{seconds:g}s"] = np.array([theirs_features.double().sum(), theirs_features.double().norm()])
        difference = (ours - theirs).abs().max().item()
        print(
            f"{name} {size or ''} {seconds:g} s: spread {spread:.3g}, difference {difference / spread:.1e} of it",
            flush=True,
        )
    return {
        "shapes": shapes,
        "num_classes": num_classes,
        "size": size,
        "source": SOURCES[original.project],
        "arrays": arrays,
    }


def write(folder: Path, name: str, found: dict[str, Any]) -> None:
    """Write NAME.json and NAME.npz."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = found.pop("arrays")
    np.savez_compressed(folder / f"{name}.npz", **arrays)
    found["sha256"] = hashlib.sha256((folder / f"{name}.npz").read_bytes()).hexdigest()
    (folder / f"{name}.json").write_text(json.dumps(found) + "\n", encoding="utf-8", newline="\n")


def main() -> None:
    """Parse the command line, compare, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--checkouts", type=Path, required=True)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--write", type=Path, help="write golden files of shallow networks into this folder")
    parser.add_argument("--models", nargs="+", default=list(GOLDEN_NAMES))
    options = parser.parse_args()
    formula = read_formula(options.shared)
    for name in options.models:
        card = teacher.model_card(name)
        size = {"depth": 2} if options.write else {}
        classes = CLASSES if options.write else 527
        card = dataclasses.replace(card, config=dataclasses.replace(card.config, **size))
        original = ORIGINALS[card.network.__name__](options.checkouts, card, classes)
        found = compare(name, original, formula, classes, **size)
        if options.write:
            write(options.write, name, found)


if __name__ == "__main__":
    main()
