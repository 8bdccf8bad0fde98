"""Every teacher by name: its shape, front end, weights' source, licence, paper and published mAP.

To add a teacher, add one `ModelCard` to `_CARDS` (and an alias, if its name is long). `create_model`, here and in timm,
the listing, and the messages about checkpoints that don't fit all read this one table.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any
from urllib.parse import urljoin

from teacher.ast_transformer import AST
from teacher.atst import ATSTClip, ATSTFrame
from teacher.audio_transformer import AudioTransformer, TransformerConfig
from teacher.beats import BEATs
from teacher.ced import CED
from teacher.eat import EAT
from teacher.front_ends import DecibelMelConfig, FrontEndConfig, KaldiFbankConfig, LogMelConfig, PasstMelConfig
from teacher.m2d import M2D
from teacher.passt import PaSST


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCard:
    """All that is known of one teacher."""

    name: str
    """Upstream's name."""

    network: type[AudioTransformer]
    config: TransformerConfig
    front_end: FrontEndConfig
    input_seconds: float = 10.0
    """The longest clip that the model looks at as a whole."""

    weights_url: str | None = None
    """Where its authors put the weights; None for a model of this project's own, and where `weights_page` is given."""

    weights_page: str | None = None
    """Page with the weights, where no program can fetch them and the user has to."""

    licence: str
    """SPDX identifier of the weights' licence."""

    paper: str
    published_map: float | None = None
    """Mean average precision on AudioSet's evaluation clips that its authors give, 0 to 1."""


PASST_PAPER = "https://arxiv.org/abs/2110.05069"
AST_PAPER = "https://arxiv.org/abs/2104.01778"
ATST_PAPER = "https://arxiv.org/abs/2306.04186"
CED_PAPER = "https://arxiv.org/abs/2308.11957"
BEATS_PAPER = "https://arxiv.org/abs/2212.09058"
EAT_PAPER = "https://arxiv.org/abs/2401.03497"
M2D_PAPER = "https://arxiv.org/abs/2210.14648"
M2D_X_PAPER = "https://arxiv.org/abs/2404.06095"
M2D_CLAP_PAPER = "https://arxiv.org/abs/2406.02032"
SSLAM_PAPER = "https://arxiv.org/abs/2506.12222"


def _passt(
    name: str,
    file: str,
    published_map: float | None,
    *,
    stride: int = 10,
    depth: int = 12,
    frames: int = 998,
    hop: int = 320,
    seconds: float = 10.0,
) -> ModelCard:
    return ModelCard(
        name=name,
        network=PaSST,
        config=TransformerConfig(frames=frames, stride=stride, depth=depth),
        front_end=PasstMelConfig(hop_samples=hop),
        input_seconds=seconds,
        weights_url=urljoin("https://github.com/kkoutini/PaSST/releases/download/", file),
        licence="Apache-2.0",
        paper=PASST_PAPER,
        published_map=published_map,
    )


def _ast(name: str, release: str, published_map: float, *, stride: int = 10) -> ModelCard:
    return ModelCard(
        name=name,
        network=AST,
        config=TransformerConfig(frames=1024, stride=stride),
        front_end=KaldiFbankConfig(),
        weights_url=f"https://huggingface.co/MIT/ast-finetuned-audioset-{release}/resolve/main/model.safetensors",
        licence="BSD-3-Clause",
        paper=AST_PAPER,
        published_map=published_map,
    )


def _ced(size: str, embed_dim: int, num_heads: int, published_map: float) -> ModelCard:
    return ModelCard(
        name=f"ced_{size}",
        network=CED,
        config=TransformerConfig(embed_dim=embed_dim, num_heads=num_heads, mels=64, frames=1012, stride=16),
        front_end=DecibelMelConfig(),
        weights_url=f"https://huggingface.co/mispeech/ced-{size}/resolve/main/model.safetensors",
        licence="Apache-2.0",
        paper=CED_PAPER,
        published_map=published_map,
    )


def _eat(name: str, repository: str, published_map: float, paper: str = EAT_PAPER, **size: Any) -> ModelCard:
    return ModelCard(
        name=name,
        network=EAT,
        config=TransformerConfig(frames=1024, stride=16, head_norm_eps=1e-6, **size),
        front_end=KaldiFbankConfig(mean=-4.268, deviation=4.569),
        weights_url=f"https://huggingface.co/{repository}/resolve/main/model.safetensors",
        licence="MIT",
        paper=paper,
        published_map=published_map,
    )


def _beats(name: str, published_map: float) -> ModelCard:
    return ModelCard(
        name=name,
        network=BEATs,
        config=TransformerConfig(frames=1024, stride=16, norm_eps=1e-5),
        front_end=KaldiFbankConfig(
            frames=None, window="povey", scale=32768.0, subtract_mean=False, mean=15.41663, deviation=6.55582
        ),
        weights_page="https://github.com/microsoft/unilm/tree/master/beats",
        licence="MIT",
        paper=BEATS_PAPER,
        published_map=published_map,
    )


def _m2d(name: str, release: str, published_map: float, paper: str, front_end: LogMelConfig | None = None) -> ModelCard:
    return ModelCard(
        name=name,
        network=M2D,
        config=TransformerConfig(mels=80, frames=1001, stride=16),
        front_end=front_end or LogMelConfig(),
        weights_url=f"https://github.com/nttcslab/m2d/releases/download/v0.3.0/{release}.zip",
        licence="LicenseRef-NTT-M2D",  # LICENSE.pdf in github.com/nttcslab/m2d
        paper=paper,
        published_map=published_map,
    )


def _atst(name: str, network: type[AudioTransformer], published_map: float | None) -> ModelCard:
    # Its authors put pretrained weights alone on the net; what their script makes of them is read.
    return ModelCard(
        name=name,
        network=network,
        config=TransformerConfig(mels=64, frames=1001, patch=4, stride=4, whole_band=True),
        front_end=DecibelMelConfig(
            fft_samples=1024,
            lowest_hz=60.0,
            highest_hz=7800.0,
            range_db=80.0,
            scaled_db=(-79.6482, 50.6842),
            middle_seconds=12.0,
        ),
        licence="CC-BY-4.0",
        paper=ATST_PAPER,
        published_map=published_map,
    )


# The small teachers for machines without a GPU. Their sizes are set here and nowhere else.
_PASST_TINY = TransformerConfig(embed_dim=128, depth=4, num_heads=4, frames=1000, patch=8, stride=8, whole_band=True)
_AST_TINY = replace(_PASST_TINY, frames=1024)

_AST_BEST = _ast("ast_base_p16_s10_ap4593", "10-10-0.4593", 0.4593)

_CARDS = (
    _passt("passt_s_swa_p16_128_ap476", "v0.0.1-audioset/passt-s-f128-p16-s10-ap.476-swa.pt", 0.476),
    _passt("passt_s_kd_p16_128_ap486", "v.0.0.9/passt-s-kd-ap.486.pt", 0.486),
    _passt("passt_l_kd_p16_128_ap47", "v.0.0.10/passt-l-kd-ap.47.pt", 0.4708, depth=7),
    _passt("passt_s_swa_p16_128_ap4761", "v0.0.2-audioset/passt-s-f128-p16-s10-ap.4761-swa.pt", 0.4761),
    _passt("passt_s_p16_128_ap472", "v0.0.2-audioset/passt-s-f128-p16-s10-ap.472.pt", 0.472),
    _passt("passt_s_swa_p16_s12_128_ap473", "v0.0.2-audioset/passt-s-f128-p16-s12-ap.473-swa.pt", 0.473, stride=12),
    _passt("passt_s_p16_s12_128_ap470", "v0.0.2-audioset/passt-s-f128-p16-s12-ap.470.pt", 0.470, stride=12),
    _passt("passt_s_swa_p16_s14_128_ap471", "v0.0.2-audioset/passt-s-f128-p16-s14-ap.471-swa.pt", 0.471, stride=14),
    _passt("passt_s_p16_s14_128_ap469", "v0.0.2-audioset/passt-s-f128-p16-s14-ap.469.pt", 0.469, stride=14),
    _passt("passt_s_swa_p16_s16_128_ap473", "v0.0.2-audioset/passt-s-f128-p16-s16-ap.473-swa.pt", 0.473, stride=16),
    _passt("passt_s_p16_s16_128_ap468", "v0.0.2-audioset/passt-s-f128-p16-s16-ap.468.pt", 0.468, stride=16),
    _passt(
        "passt_s_swa_f128_stfthop100_p16_s10_ap473",
        "v0.0.3-audioset/passt-s-f128-stfthop100-p16-s10-ap.473-swa.pt",
        0.473,
        hop=100,
        frames=3200,
    ),
    _passt(
        "passt_s_swa_f128_stfthop160_p16_s10_ap473",
        "v0.0.3-audioset/passt-s-f128-stfthop160-p16-s10-ap.473-swa.pt",
        0.473,
        hop=160,
        frames=2000,
    ),
    _passt(
        "passt_s_f128_20sec_p16_s10_ap474_swa",
        "v0.0.5/passt-s-f128-20sec-p16-s10-ap.474-swa.pt",
        0.474,
        seconds=20.0,
        frames=2000,
    ),
    _passt(
        "passt_s_f128_30sec_p16_s10_ap473_swa",
        "v0.0.5/passt-s-f128-30sec-p16-s10-ap.473-swa.pt",
        0.473,
        seconds=30.0,
        frames=3000,
    ),
    _AST_BEST,
    _ast("ast_base_p16_s10_ap450", "10-10-0.450", 0.450),
    _ast("ast_base_p16_s10_ap448", "10-10-0.448", 0.448),
    _ast("ast_base_p16_s10_ap448_v2", "10-10-0.448-v2", 0.448),
    _ast("ast_base_p16_s12_ap447", "12-12-0.447", 0.447, stride=12),
    _ast("ast_base_p16_s14_ap443", "14-14-0.443", 0.443, stride=14),
    _ast("ast_base_p16_s16_ap442", "16-16-0.442", 0.442, stride=16),
    # The same weights as Hugging Face's own code runs them: another epsilon, and the clip's mean stays in.
    replace(
        _AST_BEST,
        name="ast_base_p16_s10_hf",
        config=replace(_AST_BEST.config, norm_eps=1e-12, head_norm_eps=1e-12),
        front_end=KaldiFbankConfig(subtract_mean=False),
    ),
    _ced("tiny", 192, 3, 0.4814),
    _ced("mini", 256, 4, 0.4896),
    _ced("small", 384, 6, 0.4958),
    _ced("base", 768, 12, 0.4999),
    _eat("eat_base_epoch30_ap489", "worstchan/EAT-base_epoch30_finetune_AS2M", 0.489),
    _eat(
        "eat_large_epoch20_ap495",
        "worstchan/EAT-large_epoch20_finetune_AS2M",
        0.495,
        embed_dim=1024,
        depth=24,
        num_heads=16,
    ),
    _eat("sslam_base_ap502", "ta012/SSLAM_AS2M_Finetuned", 0.502, SSLAM_PAPER),
    _beats("beats_iter1", 0.479),
    _beats("beats_iter2", 0.481),
    _beats("beats_iter3", 0.480),
    _beats("beats_iter3_plus_as20k", 0.486),
    _beats("beats_iter3_plus_as2m", 0.486),
    _m2d("m2d_clap_base_p16_ap485", "m2d_clap_vit_base-80x1001p16x16-240128_AS-FT_enconly", 0.485, M2D_CLAP_PAPER),
    _m2d("m2d_as_base_p16_ap485", "m2d_as_vit_base-80x1001p16x16-240213_AS-FT_enconly", 0.485, M2D_X_PAPER),
    _m2d("m2d_base_p16_ap479", "m2d_vit_base-80x1001p16x16-221006-mr7_as_46ab246d", 0.479, M2D_PAPER),
    _m2d(
        "m2d_as_base_p16_32khz_ap480",
        "m2d_as_vit_base-80x1001p16x16p32k-240413_AS-FT_enconly",
        0.480,
        M2D_X_PAPER,
        LogMelConfig(sample_rate_hz=32000, fft_samples=800, hop_samples=320, highest_hz=16000.0),
    ),
    _atst("atst_frame_base", ATSTFrame, 0.480),
    _atst("atst_clip_base", ATSTClip, None),
    ModelCard(
        name="passt_tiny",
        network=PaSST,
        config=_PASST_TINY,
        front_end=PasstMelConfig(),
        licence="Apache-2.0",
        paper=PASST_PAPER,
    ),
    ModelCard(
        name="ast_tiny",
        network=AST,
        config=_AST_TINY,
        front_end=KaldiFbankConfig(),
        licence="Apache-2.0",
        paper=AST_PAPER,
    ),
)

CARDS: Mapping[str, ModelCard] = {card.name: card for card in _CARDS}

ALIASES: Mapping[str, str] = {
    "passt_s": "passt_s_swa_p16_128_ap476",
    "passt_s_20sec": "passt_s_f128_20sec_p16_s10_ap474_swa",
    "passt_s_30sec": "passt_s_f128_30sec_p16_s10_ap473_swa",
    "passt_s_f128_20sec_p16_s10_ap474": "passt_s_f128_20sec_p16_s10_ap474_swa",
    "passt_s_f128_30sec_p16_s10_ap473": "passt_s_f128_30sec_p16_s10_ap473_swa",
    "ast_base": "ast_base_p16_s10_ap4593",
    "ast_base_p16_s10": "ast_base_p16_s10_ap4593",
    "ast_base_p16_s12": "ast_base_p16_s12_ap447",
    "ast_base_p16_s14": "ast_base_p16_s14_ap443",
    "ast_base_p16_s16": "ast_base_p16_s16_ap442",
    "eat_base": "eat_base_epoch30_ap489",
    "eat_large": "eat_large_epoch20_ap495",
    "sslam": "sslam_base_ap502",
    "beats": "beats_iter3_plus_as2m",
    "m2d": "m2d_clap_base_p16_ap485",
    "m2d_32khz": "m2d_as_base_p16_32khz_ap480",
}


def model_names() -> list[str]:
    """Returns the names of all registered teachers, without aliases."""
    return list(CARDS)


def aliases_of(name: str) -> list[str]:
    """Returns a teacher's aliases."""
    return [alias for alias, stands_for in ALIASES.items() if stands_for == name]


def model_card(name: str) -> ModelCard:
    """Look a teacher up by its name or an alias.

    Raises:
        ValueError: nothing is registered under that name; the message gives the closest ones.
    """
    card = CARDS.get(ALIASES.get(name, name))
    if card is None:
        close = get_close_matches(name, [*CARDS, *ALIASES], n=4, cutoff=0.3) or list(ALIASES)
        raise ValueError(f"no teacher is called {name!r}; did you mean {', '.join(close)}?")
    return card


def released_weights(card: ModelCard) -> str:
    """Returns the URL of a model's released weights.

    Raises:
        ValueError: nowhere.
    """
    if card.weights_url is None and card.weights_page is not None:
        raise ValueError(
            f"the weights of {card.name} have to be fetched by hand from {card.weights_page}; "
            f"then give {card.name}=FILE"
        )
    if card.weights_url is None:
        raise ValueError(f"no weights were released for {card.name}: train it, or give a checkpoint of your own")
    return card.weights_url
