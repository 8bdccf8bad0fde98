"""Where the tests find reference outputs and real sounds; both lie beside the checkout and tests skip without them."""

import json
import sys
import tarfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import settings
from object_servers import ACCESS_KEY, BUCKET, SECRET_KEY, Proxy, S3Server, proxy_before, s3_server

from pipeline.models.device import compute_in

# A busy machine is no failure; each test's own time limit catches what hangs.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what wants a GPU where torch sees none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="torch sees no GPU"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the test computes, in float32 that is float32."""
    compute_in("float32", [])
    return torch.device(request.param)


def _shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"the reference folder ../shared/{name} is not beside this checkout")
    return path


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Sums depend on how many threads share them, so runs that are compared bit for bit have equally many."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


DatasetMaker = Callable[..., Path]


@pytest.fixture(scope="session")
def make_dataset() -> DatasetMaker:
    """Write a dataset of tiny clips: `make_dataset(folder, clips=24, classes=4, broken=())` → the folder.

    Clip number n is a tone of half a second whose pitch tells its class, n modulo the classes; those in `broken` hold
    no sound. Clips go to shards of 10.
    """
    import io

    import numpy as np
    import pyarrow as pa
    import soundfile

    from pipeline.dataset.clips import Clip
    from pipeline.dataset.manifest import SCHEMA, write_manifest
    from pipeline.dataset.shards import open_shard
    from pipeline.dataset.vocabulary import LabelClass, Vocabulary

    def encoded(number: int, classes: int) -> bytes:
        rng = np.random.default_rng(number)
        time = np.arange(8000) / 16000
        tone = 0.3 * np.sin(2 * np.pi * 400 * 2 ** (number % classes) * time) + 0.01 * rng.standard_normal(8000)
        stream = io.BytesIO()
        soundfile.write(stream, tone, 16000, format="FLAC")
        return stream.getvalue()

    def make(folder: Path, clips: int = 24, classes: int = 4, broken: tuple[int, ...] = ()) -> Path:
        rows = []
        for first in range(0, clips, 10):
            shard, numbers = f"train-{first // 10:06d}.tar", range(first, min(first + 10, clips))
            with open_shard(str(folder), shard) as writer:
                for number in numbers:
                    audio = b"no sound at all" if number in broken else encoded(number, classes)
                    labels = (number % classes,)
                    writer.write(Clip(clip_id=f"clip{number}", audio=audio, format="flac", labels=labels), {})
            rows += [
                {"clip_id": f"clip{number}", "shard": shard, "offset": offset, "size": size, "format": "flac"}
                | {"labels": [number % classes]}
                for number, (offset, size) in zip(numbers, writer.ranges, strict=True)
            ]
        vocabulary = Vocabulary(tuple(LabelClass(index, f"/t/{index}", f"tone {index}") for index in range(classes)))
        write_manifest(folder, pa.Table.from_pylist(rows, schema=SCHEMA), vocabulary)
        return folder

    return make


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An S3 server on loopback, for the whole session."""
    with s3_server(tmp_path_factory.mktemp("s3") / "objects") as server:
        yield server


@pytest.fixture
def s3_folder(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty folder on the S3 server, with the environment that finds it."""
    _use_s3(monkeypatch, s3.endpoint)
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture(scope="session")
def _session_proxy(s3: S3Server) -> Iterator[Proxy]:
    with proxy_before(s3.port) as proxy:
        yield proxy


@pytest.fixture
def s3_proxy(_session_proxy: Proxy, s3_folder: str, monkeypatch: pytest.MonkeyPatch) -> Proxy:
    """A proxy before the S3 server, which the environment names instead of the server itself."""
    _session_proxy.reset()
    _use_s3(monkeypatch, _session_proxy.endpoint)
    return _session_proxy


def _use_s3(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
