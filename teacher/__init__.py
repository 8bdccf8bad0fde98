"""Audio transformers that teach: PaSST, AST and CED, each with the front end that its checkpoints were trained on.

`create_model` builds one by name; importing this package makes the same names known to `timm.create_model`.
"""

from teacher.audio_transformer import AudioTransformer, TransformerConfig
from teacher.ensemble import Ensemble, ensemble_logits
from teacher.factory import create_model
from teacher.front_ends import FrontEnd
from teacher.registry import ModelCard, model_card, model_names, released_weights

__all__ = [
    "AudioTransformer",
    "Ensemble",
    "FrontEnd",
    "ModelCard",
    "TransformerConfig",
    "create_model",
    "ensemble_logits",
    "model_card",
    "model_names",
    "released_weights",
]
