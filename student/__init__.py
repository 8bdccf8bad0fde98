"""The students: small CNNs that tag sounds, and how they learn. Tensors in, tensors out."""

from student.front_end import FrontEndConfig, LogMelFrontEnd
from student.losses import DistillConfig, blend_targets, clip_bce, distillation_loss, teacher_probabilities
from student.metrics import TaggingScores, average_precision, d_prime, roc_auc, tagging_scores
from student.mixup import Mix, MixupConfig, draw_mix
from student.registry import ModelCard, create_model, load_weights, model_card, model_names
from student.schedule import ScheduleConfig, learning_rate_multiplier
from student.tagger import Tagger

__all__ = [
    "DistillConfig",
    "FrontEndConfig",
    "LogMelFrontEnd",
    "Mix",
    "MixupConfig",
    "ModelCard",
    "ScheduleConfig",
    "Tagger",
    "TaggingScores",
    "average_precision",
    "blend_targets",
    "clip_bce",
    "create_model",
    "d_prime",
    "distillation_loss",
    "draw_mix",
    "learning_rate_multiplier",
    "load_weights",
    "model_card",
    "model_names",
    "roc_auc",
    "tagging_scores",
    "teacher_probabilities",
]
