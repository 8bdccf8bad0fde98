"""Where released weights come from: a function that is handed in, or the one that the installation offers.

This package reads no cache and opens no connection of its own. An installed program names its function under the
entry-point group `audioset_distill.fetch`; where there is none, `torch.hub` and the Hugging Face Hub's client do it.
"""

import re
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from urllib.parse import unquote

import torch

Fetch = Callable[[str], str | Path]
"""URL of a released file → the file on this machine."""

FETCH_GROUP = "audioset_distill.fetch"

_HUB_FILE = re.compile(r"https://huggingface\.co/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


def fetch_weights(url: str) -> str | Path:
    """Returns a released file, fetched if it isn't in the user's cache yet."""
    for entry_point in entry_points(group=FETCH_GROUP):
        return entry_point.load()(url)
    if hub_file := _HUB_FILE.fullmatch(url):
        from huggingface_hub import hf_hub_download

        return hf_hub_download(hub_file[1], hub_file[3], revision=hub_file[2])
    file = Path(torch.hub.get_dir()) / "checkpoints" / unquote(url.rpartition("/")[2])
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(file))
    return file
