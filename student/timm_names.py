"""The students' names in `timm.create_model`. Imports timm; `student.timm_registration` sees to when."""

from collections.abc import Callable
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from student.pretrained import fetch_weights
from student.registry import ModelCard, final_layers, model_card, model_names, released_weights
from student.state_dicts import fit_to_model


def _timm_builder(name: str) -> Callable[..., torch.nn.Module]:
    """Make the function that timm calls for a name."""

    def build(pretrained: bool = False, **kwargs: Any) -> torch.nn.Module:
        card = model_card(name)
        overlay = dict(kwargs.pop("pretrained_cfg_overlay", None) or {})
        told = kwargs.get("pretrained_cfg")  # from config.json of local-dir: and hf-hub:
        given = {**(told if isinstance(told, dict) else {}), **overlay}
        if pretrained and not given.keys() & {"file", "url", "hf_hub_id", "state_dict"}:
            overlay["file"] = str(fetch_weights(released_weights(card)))
        model = build_model_with_cfg(
            card.network,
            card.name,
            pretrained,
            feature_cfg={"flatten_sequential": True},
            pretrained_filter_fn=lambda state_dict, model: fit_to_model(state_dict, model, final_layers(model)),
            pretrained_cfg_overlay=overlay,
            kwargs_filter=("in_chans", "global_pool"),  # pyright: ignore[reportArgumentType]
            **{**card.settings, **kwargs},
        )
        model.model_name = card.name
        return model

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"Build {name} for timm."
    return build


def _default_cfg(card: ModelCard) -> dict[str, Any]:
    return {
        "url": card.weights_url or "",
        "num_classes": 527,
        "input_size": (1, card.settings.get("n_mels", 128), 1000),
        "classifier": "classifier",
        "license": card.licence.lower(),
        "paper_ids": card.paper.replace("https://arxiv.org/abs/", "arXiv:"),
        "origin_url": "https://github.com/fschmid56/EfficientAT",
    }


# timm looks for this name in the module of every registered function.
default_cfgs = generate_default_cfgs({name: _default_cfg(model_card(name)) for name in model_names()})
for _name in model_names():
    register_model(_timm_builder(_name))
