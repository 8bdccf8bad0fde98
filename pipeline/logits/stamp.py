"""What made a logit store: kept in every part and in store.json, and compared before any logits are used."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import ClassVar, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from pipeline.dataset.views import ViewsStamp
from pipeline.errors import LogitStoreError, UsageError


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
    """How waveforms became features; where seconds follow, all clips were padded with silence or cut to that length."""
    clip_lengths: str | None = None
    """What became of clips that kept lengths of their own; None where the front end's seconds say it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFile:
    """A file that logits were taken from."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    name: str
    """Its name, without the folder that it lay in."""
    size: int
    """Bytes."""
    sha256: str
    """Of its bytes, hexadecimal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportStamp:
    """Where logits came from that this program did not compute: what is known of them, and no more."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    layout: str
    """How the files were laid out: efficientat-npy, ced-hdf5, parquet …"""
    files: tuple[SourceFile, ...]
    """All that were read, in the order in which they were."""
    origin: str
    """Who made the logits, with what, in the words of whoever imported them; empty where nothing was said."""
    held: Literal["logits", "probabilities"]
    """What the numbers in the files were."""
    conversion: str = ""
    """How they became the stored logits, such as `logit of probabilities held within 1e-6 and 1 - 1e-6`, or how
    classes were renumbered; empty where they are stored as they were."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreStamp:
    """Two parts with equal stamps hold comparable numbers."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    values: str = "logits"
    """`logits` are before the sigmoid: the weighted mean over the teachers' logits."""
    teachers: tuple[TeacherStamp, ...]
    """In the order of the command line; none where the logits were imported and their teachers' weights are unknown."""
    vocabulary_sha256: str
    """Of the class list that numbers the logits."""
    classes: int
    precision: str
    """Of the teachers' arithmetic: float32, bfloat16, float16, or unknown. Stored logits are always float16."""
    members: Literal["float16"] | None = None
    """Whether each teacher's own logits are kept beside their mean, and as what."""
    top_k: int | None = None
    """How many logits of a row are kept, the largest; None is all."""
    views: ViewsStamp | None = None
    """Which views of each clip the logits are of; None is the clip as it is."""
    imported: ImportStamp | None = None
    """Where the logits came from, where this program did not compute them."""

    def __post_init__(self) -> None:
        if self.top_k is not None and not 1 <= self.top_k < self.classes:
            raise ValueError(
                f"top_k is {self.top_k}; choose 1 to {self.classes - 1}, or keep all {self.classes} classes"
            )
        if self.members is not None and self.top_k is not None:
            raise ValueError("members are kept whole or not at all, so that they can be weighed anew; leave out top_k")

    @property
    def view_count(self) -> int:
        """Rows of a clip."""
        return 1 if self.views is None else self.views.count

    @property
    def weights(self) -> tuple[float, ...]:
        """The teachers' weights in the mean."""
        return tuple(teacher.weight for teacher in self.teachers)

    def to_json(self) -> bytes:
        """Returns the stamp as JSON; `from_json` reads it. Equal stamps give equal bytes."""
        # What a store does not have is not mentioned: an older version reads all that it understands.
        return _STAMPS.dump_json(self, indent=2, exclude_none=True)

    @staticmethod
    def from_json(text: bytes, location: str) -> "StoreStamp":
        """Read a stamp.

        Raises:
            LogitStoreError: `text` is no stamp, or one of a newer version; the message names `location`.
        """
        try:
            for former, present in _FORMER_KEYS.items():
                text = text.replace(former, present)
            return _STAMPS.validate_json(text)
        except (ValidationError, UsageError) as error:
            first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": ("views",), "msg": str(error)}
            where = ".".join(str(step) for step in first["loc"])
            raise LogitStoreError(
                f"{location}: its stamp can't be read ({where}: {first['msg']}). It was damaged, or written by a newer "
                "version of this program: update, or make the store again with `pipeline teacher-logits`."
            ) from error

    def differences_from(self, other: "StoreStamp") -> str:
        """Returns in a line how this stamp differs from `other`; empty where they are equal."""
        if len(self.teachers) != len(other.teachers):
            return f"{len(self.teachers)} teachers, not {len(other.teachers)}"
        pairs = [("", self, other)] + [
            (f"teacher {number} ", mine, its)
            for number, (mine, its) in enumerate(zip(self.teachers, other.teachers, strict=True), start=1)
        ]
        return "; ".join(difference for owner, mine, its in pairs for difference in _differences(owner, mine, its))


def _differences(owner: str, mine: object, its: object) -> Iterator[str]:
    """Compare two stamps of one kind, field by field, and their stamps inside likewise."""
    for field in fields(mine):  # pyright: ignore[reportArgumentType]
        one, other = getattr(mine, field.name), getattr(its, field.name)
        if field.name == "teachers" or one == other:
            continue
        if is_dataclass(one) and is_dataclass(other):
            yield from _differences(f"{owner}{field.name} ", one, other)
        else:
            yield f"{owner}{field.name} is {_short(one)}, not {_short(other)}"


_STAMPS = TypeAdapter(StoreStamp)
_FORMER_KEYS = {b'"most_shift_ms":': b'"max_shift_ms":', b'"most_gain_db":': b'"max_gain_db":'}
"""Keys that earlier versions wrote → as they are called now."""


def _short(value: object) -> str:
    # Twelve digits tell two hashes apart and leave the line readable.
    if is_dataclass(value):
        return "given"
    text = "none" if value is None else str(value)
    return text[:12] if len(text) == 64 else text
