"""What made a logit store: kept in every part and in store.json, and compared before any logits are used."""

from dataclasses import dataclass, fields
from typing import ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from pipeline.errors import LogitStoreError


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherStamp:
    """One member of the ensemble."""

    # A field that this version does not know may change what the logits mean, so it is refused, not passed over.
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    name: str
    """The registered model."""
    weight: float
    """Its share of the mean is this over the sum of all weights."""
    sha256: str
    """Of the checkpoint's bytes, hexadecimal."""
    front_end: str
    """How waveforms became features."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreStamp:
    """Two parts with equal stamps hold comparable numbers."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    values: str = "logits"
    """`logits` are before the sigmoid: the weighted mean over the teachers' logits."""
    teachers: tuple[TeacherStamp, ...]
    """In the order of the command line."""
    vocabulary_sha256: str
    """Of the class list that numbers the logits."""
    classes: int
    precision: str
    """Of the teachers' arithmetic: float32, bfloat16 or float16. Stored logits are always float16."""

    def to_json(self) -> bytes:
        """Spell the stamp; `from_json` gives it back. Equal stamps give equal bytes."""
        return _STAMPS.dump_json(self, indent=2)

    @staticmethod
    def from_json(text: bytes, location: str) -> "StoreStamp":
        """Read a stamp.

        Raises:
            LogitStoreError: `text` is no stamp, or one of a newer version; the message names `location`.
        """
        try:
            return _STAMPS.validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(step) for step in first["loc"])
            raise LogitStoreError(
                f"{location}: its stamp can't be read ({where}: {first['msg']}). It was damaged, or written by a newer "
                "version of this program: update, or make the store again with `pipeline teacher-logits`."
            ) from error

    def differences_from(self, other: "StoreStamp") -> str:
        """Say in a line how this stamp differs from `other`; empty where they are equal."""
        if len(self.teachers) != len(other.teachers):
            return f"{len(self.teachers)} teachers, not {len(other.teachers)}"
        pairs = [("", self, other)] + [
            (f"teacher {number} ", mine, its)
            for number, (mine, its) in enumerate(zip(self.teachers, other.teachers, strict=True), start=1)
        ]
        return "; ".join(
            f"{owner}{field.name} is {_short(getattr(mine, field.name))}, not {_short(getattr(its, field.name))}"
            for owner, mine, its in pairs
            for field in fields(mine)
            if field.name != "teachers" and getattr(mine, field.name) != getattr(its, field.name)
        )


_STAMPS = TypeAdapter(StoreStamp)


def _short(value: object) -> str:
    # Twelve digits tell two hashes apart and leave the line readable.
    text = str(value)
    return text[:12] if len(text) == 64 else text
