"""The commands that README.md and the pages of docs/ and manifests/ show."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "manifests").rglob("*.md"))]
_BLOCK = re.compile(r"^```(?:sh|bash|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`((?:pipeline|torchrun) [^`]+)`")
_OURS = re.compile(r"(^|\s)pipeline\s+(?:--\s+)?[a-z]")


@dataclass(frozen=True, slots=True)
class ShownCommand:
    """A line of a page that is to be typed, or a command that a sentence names."""

    page: str
    line: str
    """Without its comment."""
    whole: bool
    """It is to be typed as it stands."""

    @property
    def is_ours(self) -> bool:
        """Whether it runs `pipeline`."""
        return _OURS.search(self.line) is not None

    def __str__(self) -> str:
        """Returns its name in a list of tests."""
        return f"{self.page}: {self.line}"


def shown_commands() -> Iterator[ShownCommand]:
    """Yields the commands of all pages, in their order; those of a page's blocks before those of its sentences."""
    for page in PAGES:
        text, name = page.read_text(), str(page.relative_to(ROOT))
        for block in _BLOCK.findall(text):
            for line in block.replace("\\\n", " ").splitlines():
                command = " ".join(re.sub(r"(^|\s)#.*", "", line).split())
                if command:
                    yield ShownCommand(name, command, "…" not in command)
        for command in _INLINE.findall(_BLOCK.sub("", text)):
            shown = ShownCommand(name, " ".join(command.split()), False)
            if shown.is_ours:
                yield shown
