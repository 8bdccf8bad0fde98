"""The students' names in `timm.create_model`; see docs/timm.md. `student.timm_registration` sees to its import."""

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg

from student.dymn import DyMN
from student.front_end import FRONT_END_KEYWORDS, front_end_config
from student.heads import head_class
from student.pretrained import fetch_weights
from student.registry import ModelCard, final_layers, model_card, model_names, released_weights
from student.state_dicts import fit_to_model
from student.tagger import Tagger
from student.timm_model import is_pooled


def _timm_builder(name: str) -> Callable[..., torch.nn.Module]:
    """Make the function that timm calls for a name."""
    registered = model_card(name).weights_url or ""

    def build(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Mapping[str, Any] | None = None,
        in_chans: int = 1,
        drop_rate: float | None = None,
        global_pool: str | None = None,
        feature_location: Any = "stage",
        **kwargs: Any,
    ) -> torch.nn.Module:
        card = model_card(name)
        if in_chans != 1:
            raise ValueError(f"in_chans is {in_chans}, but the log-mel images that {name} takes have one channel")
        settings = {**card.settings, **kwargs}
        if drop_rate is not None:
            if settings.get("head_type", "mlp") != "mlp" and drop_rate:
                raise ValueError(f"drop_rate is {drop_rate}, but the head of {name} has no hidden layer to drop from")
            kwargs["dropout"] = drop_rate
        described = {**_described(card.network, settings), **(pretrained_cfg_overlay or {})}
        config = resolve_pretrained_cfg(name, pretrained_cfg, described)
        elsewhere = config.file or config.hf_hub_id or config.state_dict or config.url != registered
        if pretrained and not elsewhere:
            described["file"] = str(fetch_weights(released_weights(card)))

        def network(**given: Any) -> Tagger:
            model = card.network(**given)
            model.model_name = card.name
            model.pools = is_pooled(global_pool, model.num_classes)
            model.set_feature_location(feature_location)
            return model

        return build_model_with_cfg(
            network,
            card.name,
            pretrained,
            pretrained_cfg=pretrained_cfg,
            feature_cfg={"flatten_sequential": True},
            pretrained_filter_fn=lambda state_dict, model: fit_to_model(state_dict, model, final_layers(model)),
            pretrained_cfg_overlay=described,
            kwargs_filter=("in_chans", "global_pool"),  # pyright: ignore[reportArgumentType]
            **{**card.settings, **kwargs},
        )

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"Build {name} for timm."
    return build


def _described(network: type[Tagger], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what is true of a network's input and output, in the words of timm's configurations."""
    images = front_end_config(**{key: settings[key] for key in settings.keys() & FRONT_END_KEYWORDS})
    frames = images.frames(round(network.input_seconds * images.sample_rate_hz))
    strides = settings.get("strides", (2, 2, 2, 2))
    reduction = 2 * prod(strides[:3] if settings.get("dilated") else strides)
    last = tuple(f"classifier.{layer}" for layer in head_class(settings.get("head_type", "mlp")).final_layers)
    return {
        "input_size": (1, images.mels, frames),
        "pool_size": (-(-images.mels // reduction), -(-frames // reduction)),
        "crop_pct": 1.0,
        "mean": (0.0,),
        "std": (1.0,),
        "first_conv": "in_c.0" if issubclass(network, DyMN) else "features.0.0",
        "classifier": last[0] if len(last) == 1 else last,
    }


def _default_cfg(card: ModelCard) -> dict[str, Any]:
    return {
        **_described(card.network, card.settings),
        "url": card.weights_url or "",
        "num_classes": 527,
        "license": card.licence.lower(),
        "paper_ids": card.paper.replace("https://arxiv.org/abs/", "arXiv:"),
        "origin_url": "https://github.com/fschmid56/EfficientAT",
    }


# timm looks for this name in the module of every registered function.
default_cfgs = generate_default_cfgs({name: _default_cfg(model_card(name)) for name in model_names()})
for _name in model_names():
    register_model(_timm_builder(_name))
