"""Audio transformers that teach, each with the front end that its checkpoints were trained on.

The families are PaSST, AST, CED, EAT (and SSLAM), BEATs, M2D and ATST.

`create_model` builds one by name; importing this package makes the same names known to `timm.create_model`.
"""

from teacher import timm_names as _timm_names  # noqa: F401 - registers the names
from teacher.audio_transformer import AudioTransformer, TransformerConfig
from teacher.complexity import Complexity, count_complexity
from teacher.ensemble import Ensemble, ensemble_logits
from teacher.factory import create_model
from teacher.front_ends import FrontEnd
from teacher.registry import ModelCard, aliases_of, model_card, model_names, released_weights

__all__ = [
    "AudioTransformer",
    "Complexity",
    "Ensemble",
    "FrontEnd",
    "ModelCard",
    "TransformerConfig",
    "aliases_of",
    "count_complexity",
    "create_model",
    "ensemble_logits",
    "model_card",
    "model_names",
    "released_weights",
]
