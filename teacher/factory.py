"""A registered name, and perhaps a checkpoint → a model ready to run."""

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from teacher.audio_transformer import AudioTransformer, TransformerConfig
from teacher.front_ends import build_front_end
from teacher.pretrained import Fetch, fetch_weights
from teacher.registry import CARDS, ModelCard, model_card, released_weights
from teacher.state_dicts import Checkpoint, check_fit, read_checkpoint, shapes_of

logger = logging.getLogger(__name__)

AUDIOSET_CLASSES = 527

GENERAL_FILE_NAMES = ("model.safetensors", "pytorch_model.bin")
"""What Hugging Face calls the weights of any model."""


def create_model(
    name: str,
    checkpoint: str | Path | Mapping[str, Tensor] | None = None,
    *,
    pretrained: bool = False,
    fetch: Fetch = fetch_weights,
    num_classes: int | None = None,
    **kwargs: int | float,
) -> AudioTransformer:
    """Build a teacher.

    Args:
        name: a registered name or alias; see `model_names`.
        checkpoint: a file, a folder of Hugging Face's, or a mapping of names to tensors, in any spelling that
            `teacher.state_dicts` lists; None draws fresh weights.
        pretrained: take the weights that were released under this name as the checkpoint.
        fetch: brings them to this machine, URL → file.
        num_classes: classes of the logits; 0 gives embeddings in their place. None takes the checkpoint's, or
            AudioSet's 527 without one. Another number than the checkpoint's gives a fresh last layer, and logs that.
        kwargs: fields of `TransformerConfig` to set differently, such as `s_patchout_t`.

    Returns:
        A model in training mode with `forward(features) -> (batch, classes)` logits, `front_end`, `sample_rate_hz`,
        `input_seconds` and `model_name`.

    Raises:
        ValueError: the name or a keyword is unknown, or the checkpoint doesn't fit the model; or none was released.
        FileNotFoundError: the checkpoint does not exist.
    """
    card = model_card(name)
    if pretrained and checkpoint is None:
        checkpoint = fetch(released_weights(card))
    if checkpoint is None:
        network = _build_network(card, AUDIOSET_CLASSES if num_classes is None else num_classes, kwargs)
    else:
        network = _load_network(card, read_checkpoint(checkpoint), num_classes, kwargs)
    network.front_end = build_front_end(card.front_end, card.input_seconds)
    network.model_name = card.name
    network.input_seconds = card.input_seconds
    return network


def _build_network(card: ModelCard, num_classes: int, kwargs: Mapping[str, int | float]) -> AudioTransformer:
    known = {field.name for field in fields(TransformerConfig)}
    if unknown := kwargs.keys() - known:
        raise ValueError(f"{card.name} has no setting {', '.join(sorted(unknown))}; it has {', '.join(sorted(known))}")
    return card.network(replace(card.config, **kwargs), num_classes)


def _load_network(
    card: ModelCard, checkpoint: Checkpoint, num_classes: int | None, kwargs: Mapping[str, int | float]
) -> AudioTransformer:
    kwargs = {**_recorded_settings(card, checkpoint), **kwargs}
    asked_classes = AUDIOSET_CLASSES if num_classes is None else num_classes
    found_classes = checkpoint.num_classes or asked_classes
    with torch.device("meta"):  # shapes alone: weights drawn here would only be thrown away
        network = _build_network(card, found_classes, kwargs)
    check_fit(checkpoint, shapes_of(network.state_dict()), card.name, _names_that_fit(checkpoint, found_classes))
    _check_release(card, checkpoint)
    network.load_state_dict(checkpoint.tensors, assign=True)
    if num_classes is not None and num_classes != found_classes:
        if not num_classes:  # embeddings are wanted
            network.reset_classifier(0)
            return network
        logger.warning(
            "%s has %d classes, %d were asked for: the last layer of %s starts afresh and has to be trained",
            checkpoint.source,
            found_classes,
            num_classes,
            card.name,
        )
        network.reset_classifier(num_classes)
    return network


def _recorded_settings(card: ModelCard, checkpoint: Checkpoint) -> dict[str, int | float]:
    """Read the settings that one of our own checkpoints was made with.

    Raises:
        ValueError: it was made for a model that computes something else.
    """
    recorded = checkpoint.metadata.get("model")
    if recorded is None:
        return {}
    theirs = model_card(recorded)
    if (theirs.network, theirs.config, theirs.front_end) != (card.network, card.config, card.front_end):
        raise ValueError(f"{checkpoint.source}: was written for {recorded}, not for {card.name}; name it {recorded}")
    return json.loads(checkpoint.metadata.get("kwargs", "{}"))


def _check_release(card: ModelCard, checkpoint: Checkpoint) -> None:
    """Refuse weights of a model with the same shapes and other features, by the name that their file was released as.

    Raises:
        ValueError: the file is the release of a model that computes something else.
    """
    if "model" in checkpoint.metadata:
        return
    file = Path(checkpoint.source).name
    released_as = [other for other in CARDS.values() if (other.weights_url or "").endswith(f"/{file}")]
    twins = [other.name for other in CARDS.values() if _is_twin(card, other)]
    if any(other.weights_url == card.weights_url for other in released_as):
        return
    if names := [other.name for other in released_as if other.name in twins]:
        raise ValueError(
            f"{checkpoint.source}: was released as {names[0]}, which has the shapes of {card.name} but takes other "
            f"features. Name it {names[0]}, or rename the file if it is another one"
        )
    if released_as and file not in GENERAL_FILE_NAMES:
        logger.warning("%s was released as %s, not as %s", checkpoint.source, released_as[0].name, card.name)
    elif twins:
        logger.warning(
            "%s fits %s and %s alike, which take other features; it is taken to be %s",
            checkpoint.source,
            card.name,
            " and ".join(twins),
            card.name,
        )


def _is_twin(card: ModelCard, other: ModelCard) -> bool:
    """Whether two releases have the same network, so that one's weights fit the other, but other features."""
    same_network = (card.network, card.config) == (other.network, other.config)
    same_features = (card.front_end, card.input_seconds) == (other.front_end, other.input_seconds)
    return same_network and not same_features and card.weights_url != other.weights_url


def _names_that_fit(checkpoint: Checkpoint, num_classes: int) -> Iterator[str]:
    """Registered names whose keys and shapes the checkpoint has."""
    found = shapes_of(checkpoint.tensors)
    for card in CARDS.values():
        if _shapes(card.network, card.config, num_classes) == found:
            yield card.name


@cache
def _shapes(network: type[AudioTransformer], config: TransformerConfig, num_classes: int) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return shapes_of(network(config, num_classes).state_dict())
