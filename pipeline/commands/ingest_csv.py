"""`pipeline ingest csv`: any table of paths and labels → a dataset of shards and a manifest."""

from dataclasses import dataclass
from typing import Annotated

from cyclopts import Parameter

from pipeline.errors import UsageError
from pipeline.ingest.ingesting import IngestConfig, IngestResult, ingest
from pipeline.ingest.labelled_table import LabelledTableSource, TableColumns
from pipeline.ingest.sources import local_folder


@dataclass(frozen=True, kw_only=True, slots=True)
class IngestCsvConfig(IngestConfig):
    """Which tables, what their columns mean, where the sounds are, and what dataset they become."""

    csv: tuple[str, ...]
    """The tables, each with a line of column names at its head; several become one dataset."""
    audio: str
    """The folder that the paths in the tables are relative to."""
    path_column: str = "path"
    """The column of paths; their extension may be missing."""
    label_column: str = "label"
    """The column of labels: class ids or names. An empty field is a clip on which none of the classes is to be heard.
    Several rows with one path are one clip with all their labels."""
    unlabelled: bool = False
    """An empty field is a clip whose labels are unknown, and so is every row of tables without that column: teachers
    can label them, and a model learns them from the logits alone."""
    label_separator: str | None = None
    """What separates several labels in one field, such as a comma or a semicolon; a field is one label unless given."""
    id_column: str | None = None
    """The column of clip ids, taken as they are; the paths without their extension are the ids unless given."""
    only: tuple[str, ...] = ()
    """COLUMN=VALUE, such as split=train: take only rows with that value there; several have to hold together."""
    delimiter: str | None = None
    """What is between two fields: one character; `\\t` is a tab. A comma, a semicolon or a tab, whichever the first
    line is separated by, unless given."""
    whole_names: bool = False
    """Take a sound's path without its extension as its id, even where its name looks like YouTube's id behind a Y or
    with times after it."""

    def __post_init__(self) -> None:
        IngestConfig.__post_init__(self)
        if not self.csv:
            raise UsageError("--csv needs at least one file")
        if bad := [text for text in self.only if "=" not in text]:
            raise UsageError(f"--only is {bad[0]!r}; spell it COLUMN=VALUE")
        if self.delimiter is not None and len(self.spelled_delimiter or "") != 1:
            raise UsageError(f"--delimiter is {self.delimiter!r}; give one character")
        if self.label_separator == "":
            raise UsageError("--label-separator is empty; leave it out where a field is one label")

    @property
    def spelled_delimiter(self) -> str | None:
        """The delimiter itself; None where the first line is to tell."""
        return self.delimiter and self.delimiter.replace("\\t", "\t")


def run(config: Annotated[IngestCsvConfig, Parameter(name="*")]) -> IngestResult:
    """Turn tables of paths and labels, and the sounds, into a dataset: WebDataset shards and a manifest.

    The classes are the labels that occur, in alphabetical order, unless --classes or the dataset that is added to says
    otherwise. The encoded bytes are kept as they are. Every file is decoded once to see that it can be; the ones that
    can't, and those that are missing, are listed in the dataset's rejected.parquet.

    Raises:
        ManifestError: a table is no CSV, or no clip could be used.
        UsageError: a column is not there, the dataset is, or its folder holds tars of somebody else.
    """
    columns = TableColumns(
        path=config.path_column,
        label=config.label_column,
        empty_is_unknown=config.unlabelled,
        id=config.id_column,
        label_separator=config.label_separator,
        only=tuple((name, value) for name, _, value in (text.partition("=") for text in config.only)),
        delimiter=config.spelled_delimiter,
    )
    audio = local_folder(config.audio, "--audio")
    return ingest(
        config, LabelledTableSource(config.csv, audio, columns, config.whole_names, config.classes is not None)
    )
