"""The teachers' names in `timm.create_model`; see docs/timm.md."""

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    load_state_dict_from_hf,
    register_model,
    resolve_pretrained_cfg,
)
from torch import Tensor

from teacher.audio_transformer import TransformerConfig
from teacher.factory import AUDIOSET_CLASSES, create_model
from teacher.front_ends import build_front_end
from teacher.pretrained import fetch_weights
from teacher.registry import ALIASES, CARDS, ModelCard, model_card, released_weights
from teacher.timm_model import is_pooled

_SETTINGS = frozenset(field.name for field in fields(TransformerConfig))


def _timm_entry_point(name: str) -> Callable[..., torch.nn.Module]:
    registered = model_card(name).weights_url

    def entry_point(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Mapping[str, Any] | None = None,
        cache_dir: str | Path | None = None,
        num_classes: int | None = None,
        in_chans: int = 1,
        img_size: Any = None,
        global_pool: str | None = None,
        pretrained_model_args: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> torch.nn.Module:
        card = model_card(name)
        if in_chans != 1:
            raise ValueError(f"in_chans is {in_chans}, but the spectrograms that {name} takes have one channel")
        settings = {key: kwargs.pop(key) for key in kwargs.keys() & _SETTINGS}
        described = {**_described(card, replace(card.config, **settings)), **(pretrained_cfg_overlay or {})}
        config = resolve_pretrained_cfg(name, pretrained_cfg, described).to_dict()
        if img_size is not None and tuple(img_size) != tuple(described["input_size"][1:]):
            raise ValueError(f"img_size is {img_size}, but the front end of {name} gives {described['input_size'][1:]}")
        checkpoint = _checkpoint(card, config, cache_dir, registered) if pretrained else None
        if num_classes is None and checkpoint is None:
            num_classes = config["num_classes"]
        pooled = is_pooled(global_pool, AUDIOSET_CLASSES if num_classes is None else num_classes)

        def build(**given: Any) -> torch.nn.Module:
            given.pop("num_classes", None)  # timm's default would win over the checkpoint's
            network = create_model(name, checkpoint, num_classes=num_classes, **settings, **given)
            network.pools = pooled
            return network

        return build_model_with_cfg(
            build,
            name,
            False,  # the checkpoint is loaded by `create_model`, which knows the families' spellings
            pretrained_cfg=pretrained_cfg,
            pretrained_cfg_overlay=described,
            feature_cfg={"feature_cls": "getter", "out_indices": 3},
            kwargs_filter=("in_chans", "img_size"),  # pyright: ignore[reportArgumentType]
            pretrained_model_args=dict(pretrained_model_args or {}),
            **kwargs,
        )

    entry_point.__name__ = entry_point.__qualname__ = name
    entry_point.__doc__ = f"Build {name} for timm."
    return entry_point


def _checkpoint(
    card: ModelCard, config: Mapping[str, Any], cache_dir: Any, registered: str | None
) -> str | Path | Mapping[str, Tensor]:
    """Returns the weights that timm's configuration names, wherever that came from: a file, a folder, or tensors.

    The address that the name was `registered` with means the release.

    Raises:
        ValueError: there are none.
    """
    if config.get("state_dict"):
        return config["state_dict"]
    if config.get("file"):  # a file, or the folder of local-dir:
        return str(config["file"])
    if config.get("hf_hub_id"):
        return load_state_dict_from_hf(config["hf_hub_id"], weights_only=True, cache_dir=cache_dir)
    url = config.get("url")
    return fetch_weights(url if url and url != registered else released_weights(card))


def _described(card: ModelCard, config: TransformerConfig) -> dict[str, Any]:
    """Returns what is true of a network's input and output, in the words of timm's configurations."""
    front_end = build_front_end(card.front_end, card.input_seconds)
    frames = front_end.frames(torch.tensor([round(card.input_seconds * card.front_end.sample_rate_hz)]))
    count = config.frames if frames is None else int(frames)
    size = (count, config.mels) if front_end.time_first else (config.mels, count)
    return {
        "input_size": (1, *size),
        "fixed_input_size": card.network.takes_fixed_frames,
        "pool_size": None,
        "crop_pct": 1.0,
        "mean": (0.0,),
        "std": (1.0,),
        "first_conv": "patch_embed.proj",
        "classifier": "head.1",
    }


def _default_cfg(card: ModelCard) -> dict[str, Any]:
    return {
        **_described(card, card.config),
        "url": card.weights_url or "",
        "num_classes": AUDIOSET_CLASSES,
        "license": card.licence.lower(),
        "paper_ids": card.paper.replace("https://arxiv.org/abs/", "arXiv:"),
    }


# timm looks for this name in the module of every registered function.
default_cfgs = generate_default_cfgs({name: _default_cfg(model_card(name)) for name in (*CARDS, *ALIASES)})
for _name in default_cfgs:
    register_model(_timm_entry_point(_name))
