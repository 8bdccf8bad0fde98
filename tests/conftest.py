"""Where the tests find reference outputs and real sounds; both lie beside the checkout and tests skip without them."""

import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


def _shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"the reference folder ../shared/{name} is not beside this checkout")
    return path


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Reference outputs of the public projects, from weights filled by a formula."""
    return _shared("golden")


@pytest.fixture(scope="session")
def fill(golden_dir: Path) -> ModuleType:
    """The module `fill.py` of the goldens: `fill_state_dict(shapes, dtypes, **fill)` and `waveform(…)`."""
    sys.path.insert(0, str(golden_dir))
    try:
        import fill as module  # pyright: ignore[reportMissingImports]
    finally:
        sys.path.remove(str(golden_dir))
    return module


@pytest.fixture(scope="session")
def golden_config(golden_dir: Path) -> Callable[[str], dict]:
    """Read NAME.json of the goldens."""
    return lambda name: json.loads((golden_dir / f"{name}.json").read_text())


@pytest.fixture(scope="session")
def sounds_dir() -> Path:
    """Real labelled sounds in AudioSet's layout."""
    return _shared("data/visible")


@pytest.fixture(scope="session")
def torture_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Awkward and broken sound files and tar shards, unpacked, with MANIFEST.json."""
    folder = tmp_path_factory.mktemp("torture")
    with tarfile.open(_shared("data/torture.tar.gz")) as archive:
        archive.extractall(folder, filter="tar")
    return folder / "torture"
