"""The students by name: every width, every model that EfficientAT released, and the same names in timm."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from student.dymn import DyMN
from student.front_end import FRONT_END_KEYWORDS, front_end_config
from student.mobilenetv3 import MobileNetV3, scaled_channels
from student.pretrained import Fetch, fetch_weights
from student.state_dicts import Shapes, describe_difference, fit_to_model, read_checkpoint, shapes_of
from student.tagger import Tagger
from student.undrawn import Undrawn
from student.warm_start import backbone_from, from_imagenet, same_keys

RELEASES = "https://github.com/fschmid56/EfficientAT/releases/download/v0.0.1/"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCard:
    """What a name stands for: a network with its front end, and the weights that were released under it."""

    name: str
    """Upstream's name."""

    network: type[Tagger]
    """The class that is built."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """Its keywords, of network and front end."""

    weights_url: str | None = None
    """Where the released weights lie; None if there are none."""

    published_map: float | None = None
    """Mean average precision on AudioSet's evaluation part as the authors state it, 0 to 1."""

    licence: str = "MIT"
    """Licence of the released weights."""

    paper: str = "https://arxiv.org/abs/2211.04772"
    """Where the model is described."""


def _mn(name: str, file: str | None = None, map_percent: float | None = None, **settings: Any) -> ModelCard:
    """Describe an MN; its width is in its name."""
    return ModelCard(
        name=name,
        network=MobileNetV3,
        settings={"width_mult": int(name[2:4]) / 10, **settings},
        weights_url=RELEASES + file if file else None,
        published_map=round(map_percent / 100, 4) if map_percent else None,
    )


def _dymn(name: str, file: str | None = None, map_percent: float | None = None, **settings: Any) -> ModelCard:
    """Describe a DyMN; its width is in its name."""
    return ModelCard(
        name=name,
        network=DyMN,
        settings={"width_mult": int(name[4:6]) / 10, **settings},
        weights_url=RELEASES + file if file else None,
        published_map=round(map_percent / 100, 4) if map_percent else None,
        paper="https://arxiv.org/abs/2310.15648",
    )


_IMAGENET_WIDTHS = (1, 2, 4, 5, 10, 20, 30, 40)
_CARDS: tuple[ModelCard, ...] = (
    *(_mn(f"mn{width:02}") for width in range(1, 41)),
    *(_mn(f"mn{width:02}_im", f"mn{width:02}_im.pt") for width in _IMAGENET_WIDTHS),
    _mn("mn10_im_pytorch", "mn10_im_pytorch.pt"),
    _mn("mn01_as", "mn01_as_mAP_298.pt", 29.8),
    _mn("mn02_as", "mn02_as_mAP_378.pt", 37.8),
    _mn("mn04_as", "mn04_as_mAP_432.pt", 43.2),
    _mn("mn05_as", "mn05_as_mAP_443.pt", 44.3),
    _mn("mn10_as", "mn10_as_mAP_471.pt", 47.1),
    _mn("mn20_as", "mn20_as_mAP_478.pt", 47.8),
    _mn("mn30_as", "mn30_as_mAP_482.pt", 48.2),
    _mn("mn40_as", "mn40_as_mAP_484.pt", 48.4),
    _mn("mn40_as(2)", "mn40_as_mAP_483.pt", 48.3),
    _mn("mn40_as(3)", "mn40_as_mAP_483(2).pt", 48.3),
    _mn("mn40_as_no_im_pre", "mn40_as_no_im_pre_mAP_483.pt", 48.3),
    _mn("mn40_as_no_im_pre(2)", "mn40_as_no_im_pre_mAP_483(2).pt", 48.3),
    _mn("mn40_as_no_im_pre(3)", "mn40_as_no_im_pre_mAP_482.pt", 48.2),
    _mn("mn40_as_ext", "mn40_as_ext_mAP_487.pt", 48.7),
    _mn("mn40_as_ext(2)", "mn40_as_ext_mAP_486.pt", 48.6),
    _mn("mn40_as_ext(3)", "mn40_as_ext_mAP_485.pt", 48.5),
    _mn("mn10_as_hop_5", "mn10_as_hop_5_mAP_475.pt", 47.5, hopsize=160),
    _mn("mn10_as_hop_15", "mn10_as_hop_15_mAP_463.pt", 46.3, hopsize=480),
    _mn("mn10_as_hop_20", "mn10_as_hop_20_mAP_456.pt", 45.6, hopsize=640),
    _mn("mn10_as_hop_25", "mn10_as_hop_25_mAP_447.pt", 44.7, hopsize=800),
    _mn("mn10_as_mels_40", "mn10_as_mels_40_mAP_453.pt", 45.3, n_mels=40),
    _mn("mn10_as_mels_64", "mn10_as_mels_64_mAP_461.pt", 46.1, n_mels=64),
    _mn("mn10_as_mels_256", "mn10_as_mels_256_mAP_474.pt", 47.4, n_mels=256),
    _mn("mn10_as_fc", "mn10_as_fc_mAP_465.pt", 46.5, head_type="fully_convolutional"),
    _mn(
        "mn10_as_fc_s2221",
        "mn10_as_fc_s2221_mAP_466.pt",
        46.6,
        head_type="fully_convolutional",
        strides=(2, 2, 2, 1),
    ),
    _mn(
        "mn10_as_fc_s2211",
        "mn10_as_fc_s2211_mAP_466.pt",
        46.6,
        head_type="fully_convolutional",
        strides=(2, 2, 1, 1),
    ),
    *(_dymn(f"dymn{width:02}") for width in (4, 10, 20)),
    *(_dymn(f"dymn{width:02}_im", f"dymn{width:02}_im.pt") for width in (4, 10, 20)),
    # Released AudioSet models were trained down to a kernel temperature of 1.
    _dymn("dymn04_as", "dymn04_as.pt", 45.0, T_max=1.0),
    _dymn("dymn10_as", "dymn10_as.pt", 47.7, T_max=1.0),
    _dymn("dymn20_as", "dymn20_as_mAP_493.pt", 49.3, T_max=1.0),
    _dymn("dymn20_as(1)", "dymn20_as.pt", T_max=1.0),
    _dymn("dymn20_as(2)", "dymn20_as_mAP_489.pt", 48.9, T_max=1.0),
    _dymn("dymn20_as(3)", "dymn20_as_mAP_490.pt", 49.0, T_max=1.0),
)
_CARD_BY_NAME: Mapping[str, ModelCard] = {card.name: card for card in _CARDS}


def model_names() -> tuple[str, ...]:
    """Returns every registered name: widths first, then released models."""
    return tuple(_CARD_BY_NAME)


def model_card(name: str) -> ModelCard:
    """Look a name up.

    Raises:
        ValueError: nothing is registered under it.
    """
    if name not in _CARD_BY_NAME:
        released = ", ".join(card.name for card in _CARDS if card.weights_url)
        raise ValueError(f"no student is called {name!r}; choose mn01 to mn40 (width x 10), or one of {released}")
    return _CARD_BY_NAME[name]


def released_weights(card: ModelCard) -> str:
    """Returns the URL of a model's released weights.

    Raises:
        ValueError: nowhere.
    """
    if card.weights_url is None:
        raise ValueError(f"no weights were released as {card.name}; those with weights end in _as or _im")
    return card.weights_url


def card_of_file(file: str) -> ModelCard | None:
    """Returns what was released in a file of that name, if anything."""
    return next((card for card in _CARDS if (card.weights_url or "").endswith(f"/{file}")), None)


def untold_settings(name: str, **kwargs: Any) -> dict[str, Any]:
    """Returns the settings of a model that no checkpoint of it tells: some of its network's, and `front_end`.

    Args:
        name: a registered name.
        kwargs: the network's keywords, which win over what the name stands for.

    Raises:
        ValueError: the name is unknown.
    """
    card = model_card(name)
    given = {**card.settings, **kwargs}
    parameters = signature(card.network).parameters
    untold = {key: given.get(key, parameters[key].default) for key in card.network.untold}
    front_end = front_end_config(**{key: given[key] for key in given.keys() & FRONT_END_KEYWORDS})
    return {**untold, "front_end": front_end}


def create_model(
    name: str,
    checkpoint: str | Path | Mapping[str, Tensor] | None = None,
    *,
    pretrained: bool = False,
    fetch: Fetch = fetch_weights,
    warm_start: bool = False,
    **kwargs: Any,
) -> Tagger:
    """Create a student with its front end.

    Args:
        name: a registered name; `timm.create_model` knows the same ones. A released name stands for its network and
            front end.
        checkpoint: a safetensors or torch file, or a state dict; None leaves the weights fresh.
        pretrained: take the weights that were released under this name as the checkpoint.
        fetch: brings them to this machine, URL → file.
        warm_start: the checkpoint is a place to train from: another head, or timm's or torchvision's MobileNetV3-Large,
            will do, and what doesn't fit starts afresh; see `load_weights`.
        kwargs: the network's keywords, which win over what the name stands for; see `MobileNetV3` and `DyMN`.

    Returns:
        The model, in training mode.

    Raises:
        ValueError: the name is unknown, a setting is out of range, the checkpoint doesn't fit, or none was released.
        FileNotFoundError: there is no such checkpoint.
    """
    card = model_card(name)
    if pretrained and checkpoint is None:
        checkpoint = fetch(released_weights(card))
    state_dict = {} if checkpoint is None else read_checkpoint(checkpoint)
    model = _build(card, {**card.settings, **kwargs}, shapes_of(state_dict))
    model.model_name = name
    if checkpoint is not None:
        _load(model, state_dict, _origin(checkpoint), warm_start=warm_start)
    return model


def _build(card: ModelCard, settings: Mapping[str, Any], given: Shapes) -> Tagger:
    """Build a network; its weights are drawn unless all of them are given."""
    if given:
        with Undrawn():
            model = card.network(**settings)
        if shapes_of(model.state_dict()) == given:
            return model
    return card.network(**settings)


def load_weights(model: Tagger, checkpoint: str | Path | Mapping[str, Tensor], *, warm_start: bool = False) -> None:
    """Load a checkpoint into a student; a last layer for another number of classes stays fresh, and that is logged.

    With `warm_start` the checkpoint may also have another head or other squeeze-excitations, or be timm's or
    torchvision's MobileNetV3-Large: what fits is taken, the rest starts afresh, and the log says which.

    Raises:
        ValueError: it doesn't fit; the message names keys, shapes, and the model that it looks like.
        FileNotFoundError: there is no such file.
    """
    _load(model, read_checkpoint(checkpoint), _origin(checkpoint), warm_start=warm_start)


def _origin(checkpoint: str | Path | Mapping[str, Tensor]) -> str:
    return "the state dict" if isinstance(checkpoint, Mapping) else str(checkpoint)


def _load(model: Tagger, state_dict: Mapping[str, Tensor], origin: str, *, warm_start: bool) -> None:
    imagenet = from_imagenet(state_dict)
    try:
        if warm_start and (imagenet is not None or not same_keys(model, state_dict)):
            fitted = backbone_from(model, imagenet or state_dict, _final_prefixes(model))
        elif imagenet is not None:
            raise ValueError("it is an image network's; it can only be trained from (warm_start=True)")
        else:
            fitted = fit_to_model(state_dict, model, final_layers(model))
    except ValueError as error:
        twin = looks_like(state_dict)
        hint = f"it looks like {twin}: create that model" if twin else "it looks like no registered student"
        raise ValueError(f"{origin} doesn't fit {model.model_name or 'the model'}: {error}; {hint}") from error
    model.load_state_dict(fitted)


def looks_like(state_dict: Mapping[str, Tensor]) -> str | None:
    """Returns the first registered model whose keys and shapes a checkpoint has, whatever its number of classes."""
    tried = set()
    for card in _CARDS:
        last = state_dict.get(card.network.last_convolution)
        if last is None or last.shape[1:2] != (scaled_channels(160, card.settings["width_mult"]),):
            continue  # another family or width: not worth building
        kind = card.settings.get("head_type")  # strides and front ends leave no trace in a checkpoint
        if kind in tried:
            continue
        tried.add(kind)
        with torch.device("meta"):  # shapes without memory or arithmetic
            twin = card.network(**card.settings)
        prefixes = _final_prefixes(twin)
        expected, found = (
            {key: shape for key, shape in shapes_of(tensors).items() if not key.startswith(prefixes)}
            for tensors in (twin.state_dict(), state_dict)
        )
        if not describe_difference(expected, found):
            return card.name
    return None


def final_layers(model: Tagger) -> list[str]:
    """Returns the names of the modules whose shapes depend on the number of classes."""
    return [f"classifier.{layer}" for layer in model.classifier.final_layers]


def _final_prefixes(model: Tagger) -> tuple[str, ...]:
    return tuple(f"{layer}." for layer in final_layers(model))
