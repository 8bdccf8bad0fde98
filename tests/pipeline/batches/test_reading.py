"""What decoding processes do of a batch."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from toy_reader import TellingReader

from pipeline.batches.reading import BatchReader
from pipeline.batches.shard_streams import StreamReader, StreamRequest
from pipeline.batches.waveform_cache import WaveformCache
from pipeline.dataset.manifest import Manifest, read_manifest
from pipeline.dataset.views import ViewConfig, ViewsStamp
from pipeline.decoding.pool import DecodingPool
from pipeline.decoding.shared_memory import share_object
from pipeline.logits.alignment import write_aligned
from pipeline.storage.cache import CacheFolder


def reader_of(manifest: Manifest, folder: Path) -> BatchReader:
    clips, views = len(manifest), ViewsStamp(count=2, config=ViewConfig())
    pieces = [(np.arange(clips), np.zeros((clips, 2, 4), np.float16))]
    logits = write_aligned(folder / "l.npy", (clips, 2, 4), np.ones(clips, bool), 0, pieces)
    cache = WaveformCache(CacheFolder(folder, 1e9), manifest, sample_rate_hz=8000, samples=5000)
    return BatchReader(manifest.clips, sample_rate_hz=8000, seconds=0.5, logits=logits, cache=cache, views=views)


def test_reading_joining_and_streaming_need_neither_torch_nor_arrow(
    tmp_path: Path, make_dataset: Callable[..., Path]
) -> None:
    reader, rows = reader_of(read_manifest(make_dataset(tmp_path, clips=6)), tmp_path), np.arange(6)
    with DecodingPool(1) as pool:
        list(pool.load(TellingReader(StreamReader(reader)), [StreamRequest(reader=0, rows=rows, coming=rows)]))
        [modules] = pool.load(TellingReader(reader), [rows])
    assert "soundfile" in modules
    assert not modules & {"torch", "pyarrow", "pandas", "webdataset", "ray"}


def test_a_reader_travels_small_however_many_clips_there_are(tmp_path: Path, make_dataset: Callable[..., Path]) -> None:
    few = share_object(reader_of(read_manifest(make_dataset(tmp_path / "few", clips=4)), tmp_path))[0]
    many = share_object(reader_of(read_manifest(make_dataset(tmp_path / "many", clips=200)), tmp_path))[0]
    assert len(many.payload) < len(few.payload) + 20 * 30  # the names of 20 shards
