"""Where released weights come from: a function that is handed in, or the one that the installation offers.

This package reads no cache and opens no connection of its own. An installed program names its function under the
entry-point group `audioset_distill.fetch`; where there is none, that of `torch.hub` is taken.
"""

from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from urllib.parse import unquote

import torch

Fetch = Callable[[str], str | Path]
"""URL of a released file → the file on this machine."""

FETCH_GROUP = "audioset_distill.fetch"


def fetch_weights(url: str) -> str | Path:
    """Returns a released file, fetched if it isn't in the user's cache yet."""
    for entry_point in entry_points(group=FETCH_GROUP):
        return entry_point.load()(url)
    file = Path(torch.hub.get_dir()) / "checkpoints" / unquote(url.rpartition("/")[2])
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(file))
    return file
