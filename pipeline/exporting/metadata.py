"""What an exported file says of itself: read without torch, written for whoever runs it anywhere."""

import json
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Json, PositiveFloat, PositiveInt, ValidationError

from pipeline.dataset.vocabulary import LabelClass, Vocabulary, parse_vocabulary
from pipeline.errors import CheckpointError, ManifestError
from pipeline.models.weights import Task

Output = Literal["logits", "probabilities", "embeddings"]
FrontEnd = Literal["inside", "outside"]


class ExportMetadata(BaseModel):
    """The properties of an exported file; each is a text there, lists and tables as JSON."""

    model_config = ConfigDict(frozen=True)

    model: str
    """The registered name."""
    output: Output
    front_end: FrontEnd
    """inside: waveforms go in. outside: what the model's front end makes of them."""
    front_end_settings: Json[dict[str, Any]]
    """Of the model's front end, for hosts that have their own."""
    sample_rate_hz: PositiveInt
    input_seconds: PositiveFloat
    """Length of the sounds that the model was trained on."""
    shortest_samples: PositiveInt
    """A shorter sound has to be filled up with silence."""
    task: Task
    """multi-label: the logits are for a sigmoid each. single-label: for one softmax."""
    classes: Json[list[str]]
    class_ids: Json[list[str]]
    licence: str
    """Of the weights; "not stated" where nobody said it of their own."""
    source: str
    """The checkpoint."""
    source_sha256: str
    exporter: str
    """The versions of what wrote the file."""
    int8: Json[dict[str, Any]] | None = None
    """Of a file with 8-bit integers: what it was calibrated with, and the mAP before and after on which clips."""

    def to_properties(self) -> dict[str, str]:
        """Returns key → text, as ONNX and torch.export keep it."""
        return {
            key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for key, value in self.model_dump(exclude_none=True).items()
        }

    def vocabulary(self, location: str) -> Vocabulary:
        """Returns the classes.

        Args:
            location: what errors call the file.

        Raises:
            CheckpointError: they are no class list.
        """
        if len(self.classes) != len(self.class_ids):
            raise CheckpointError(f"{location}: names {len(self.classes)} classes and {len(self.class_ids)} ids")
        pairs = zip(self.class_ids, self.classes, strict=True)
        listed = Vocabulary(tuple(LabelClass(index, mid, name) for index, (mid, name) in enumerate(pairs)))
        try:
            return parse_vocabulary(listed.to_csv_bytes(), f"{location} (its class list)")
        except ManifestError as error:
            raise CheckpointError(str(error)) from error

    @classmethod
    def read(cls, properties: Mapping[str, str], location: str) -> Self:
        """Read what a file says of itself.

        Raises:
            CheckpointError: it says nothing of the kind, or nonsense.
        """
        if not properties.get("classes"):
            raise CheckpointError(
                f"{location}: does not say which classes it knows: it was not written by `pipeline export`"
            )
        try:
            return cls.model_validate(properties)
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
            raise CheckpointError(f"{location}: its metadata is not what `pipeline export` writes ({wrong})") from error
