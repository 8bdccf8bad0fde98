"""The students: small CNNs that tag sounds, and how they learn. Tensors in, tensors out."""

from student.augment import AugmentConfig, augment_features, augment_waveforms
from student.bootstrap import bootstrap_mean_average_precision
from student.complexity import Complexity, count_complexity
from student.dft_front_end import DftFrontEnd
from student.dymn import DyMN, kernel_temperature
from student.front_end import FRONT_END_KEYWORDS, FrontEndConfig, LogMelFrontEnd
from student.fusion import fuse, fuse_in_place
from student.losses import (
    DistillConfig,
    blend_targets,
    clip_bce,
    distillation_loss,
    known_labels,
    masked_bce,
    teacher_probabilities,
    weighted_targets,
)
from student.metrics import (
    TaggingScores,
    accuracy,
    average_precision,
    class_accuracy,
    d_prime,
    roc_auc,
    tagging_scores,
)
from student.mixup import Mix, MixedThing, MixupConfig, draw_mix
from student.mobilenetv3 import MobileNetV3
from student.randomness import Randomness, send
from student.registry import (
    ModelCard,
    card_of_file,
    create_model,
    load_weights,
    model_card,
    model_names,
    released_weights,
    untold_settings,
)
from student.schedule import ScheduleConfig, learning_rate_multiplier
from student.squeeze_excitation import SqueezeExcitation
from student.state_dicts import read_checkpoint
from student.tagger import Tagger
from student.timm_registration import register_with_timm
from student.warm_start import IMAGENET_WEIGHTS

__all__ = [
    "FRONT_END_KEYWORDS",
    "IMAGENET_WEIGHTS",
    "AugmentConfig",
    "Complexity",
    "DftFrontEnd",
    "DistillConfig",
    "DyMN",
    "FrontEndConfig",
    "LogMelFrontEnd",
    "Mix",
    "MixedThing",
    "MixupConfig",
    "MobileNetV3",
    "ModelCard",
    "Randomness",
    "ScheduleConfig",
    "SqueezeExcitation",
    "Tagger",
    "TaggingScores",
    "accuracy",
    "augment_features",
    "augment_waveforms",
    "average_precision",
    "blend_targets",
    "bootstrap_mean_average_precision",
    "card_of_file",
    "class_accuracy",
    "clip_bce",
    "count_complexity",
    "create_model",
    "d_prime",
    "distillation_loss",
    "draw_mix",
    "fuse",
    "fuse_in_place",
    "kernel_temperature",
    "known_labels",
    "learning_rate_multiplier",
    "load_weights",
    "masked_bce",
    "model_card",
    "model_names",
    "read_checkpoint",
    "released_weights",
    "roc_auc",
    "send",
    "tagging_scores",
    "teacher_probabilities",
    "untold_settings",
    "weighted_targets",
]

register_with_timm()
