import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from own_children import decoding_processes
from toy_reader import TellingReader

from pipeline.dataset.manifest import Manifest
from pipeline.dataset.views import ViewConfig, ViewsStamp, draw_view
from pipeline.decoding.pool import DecodingPool
from pipeline.errors import LostProcessError, PipelineError
from pipeline.labelling.shard_decoder import ClipBatch, ShardDecoder
from pipeline.labelling.shard_reading import ShardReader

FIRST, SECOND = "tiny-000000.tar", "tiny-000001.tar"


def decoder_of(manifest: Manifest, **settings: object) -> ShardDecoder:
    given = {"sample_rates_hz": (16_000, 32_000), "seconds": 0.1, "batch_size": 2, "processes": 1, **settings}
    return ShardDecoder(manifest, **given)  # pyright: ignore[reportArgumentType]


@pytest.fixture
def manifest(build_dataset: Callable, make_noises: Callable) -> Manifest:
    """Two shards of five, the fourth clip broken."""
    clips = make_noises(10, 5)
    clips[3] = ("essay", (0,), b"To be, or not to be")
    return build_dataset("data", clips)


def equal(ours: list[ClipBatch], theirs: list[ClipBatch]) -> bool:
    return [batch.rows for batch in ours] == [batch.rows for batch in theirs] and all(
        torch.equal(mine.waveforms[rate], its.waveforms[rate])
        for one, other in zip(ours, theirs, strict=True)
        for mine, its in zip(one.views, other.views, strict=True)
        for rate in (16_000, 32_000)
    )


def test_batches_are_a_shards_own_in_its_order(manifest: Manifest) -> None:
    decoder = decoder_of(manifest, processes=2)
    batches = list(decoder.batches(FIRST, following=SECOND))
    assert [batch.rows for batch in batches] == [[0, 1], [2], [4]]
    assert [list(batch.failures) for batch in batches] == [[], [3], []]
    assert batches[0].views[0].waveforms[16_000].shape == (2, 1_600)
    assert [batch.rows for batch in decoder.batches(SECOND)] == [[5, 6], [7, 8], [9]]
    decoder.close()


def has_open(process: psutil.Process, name: str) -> bool:
    return any(file.path.endswith(name) for file in process.open_files())


def test_following_shard_is_decoded_while_the_first_is_used_up(manifest: Manifest) -> None:
    alone = decoder_of(manifest)
    expected = list(alone.batches(SECOND))
    alone.close()
    ahead = decoder_of(manifest)
    list(ahead.batches(FIRST, following=SECOND))
    while not all(has_open(child, SECOND) for child in decoding_processes()):
        time.sleep(0.01)
    (Path(manifest.location) / SECOND).unlink()  # it is open already, and needs nobody to open it any more
    assert equal(list(ahead.batches(SECOND)), expected)
    with pytest.raises(PipelineError, match="no such file"):
        list(ahead.batches(SECOND))
    ahead.close()


def test_missing_shard_is_told_when_its_turn_comes(manifest: Manifest) -> None:
    (Path(manifest.location) / SECOND).unlink()
    decoder = decoder_of(manifest)
    assert len(list(decoder.batches(FIRST, following=SECOND))) == 3
    with pytest.raises(PipelineError, match=f"{SECOND}: no such file"):
        list(decoder.batches(SECOND))
    decoder.close()


def test_another_shard_than_was_announced_is_read_all_the_same(manifest: Manifest) -> None:
    decoder, plain = decoder_of(manifest), decoder_of(manifest)
    list(decoder.batches(FIRST, following=SECOND))
    assert equal(list(decoder.batches(FIRST)), list(plain.batches(FIRST)))
    assert equal(list(decoder.batches(SECOND)), list(plain.batches(SECOND)))
    decoder.close()
    plain.close()


def test_views_of_a_batch_share_their_clips_and_the_first_is_plain(manifest: Manifest) -> None:
    views = ViewsStamp(count=3, config=ViewConfig(seed=1, max_shift_ms=20))
    decoder, plain = decoder_of(manifest, views=views), decoder_of(manifest)
    batches = list(decoder.batches(FIRST))
    for batch, clean in zip(batches, plain.batches(FIRST), strict=True):
        assert batch.rows == clean.rows
        assert len(batch.views) == 3
        torch.testing.assert_close(batch.views[0].waveforms, clean.views[0].waveforms)
        assert batch.views[0].edge_shifts_hz is None
        for view in batch.views[1:]:
            assert view.edge_shifts_hz is not None
            assert view.edge_shifts_hz.shape == (len(batch.rows), 2)
            assert not np.array_equal(view.waveforms[32_000], clean.views[0].waveforms[32_000])
    decoder.close()
    plain.close()


def lengths_at(batch: ClipBatch, rate: int) -> list[list[int]]:
    return [view.lengths[rate].tolist() for view in batch.views]


def test_clips_come_as_long_as_they_are_with_zeros_behind_the_shorter(
    build_dataset: Callable, make_noises: Callable
) -> None:
    clips = [clip for seconds in (0.5, 0.3, 1.2) for clip in make_noises(1, 5, seconds=seconds)]
    clips = [(f"clip{number}", *rest) for number, (_, *rest) in enumerate(clips)]
    decoder = decoder_of(build_dataset("data", clips), seconds=1.0, batch_size=3)
    [batch] = decoder.batches(FIRST)
    assert lengths_at(batch, 32_000) == [[16_000, 9_600, 32_000]], "cut at a second, never padded"
    assert lengths_at(batch, 16_000) == [[8_000, 4_800, 16_000]]
    short = batch.views[0].waveforms[32_000][1]
    assert short[9_500:9_600].any()
    assert not short[9_600:].any()
    decoder.close()


def test_a_view_ends_with_its_sound(build_dataset: Callable, make_noises: Callable) -> None:
    views = ViewsStamp(count=9, config=ViewConfig(seed=1, max_shift_ms=100))
    manifest = build_dataset("data", make_noises(1, 5, seconds=0.5))
    decoder, short = decoder_of(manifest, seconds=10.0, views=views), decoder_of(manifest, seconds=0.5, views=views)
    shifts = [draw_view(views.config, manifest.clip_ids[0].as_py(), number).shift_ms for number in range(9)]
    [batch], [cut] = decoder.batches(FIRST), short.batches(FIRST)
    assert lengths_at(batch, 16_000) == [[8_000 + 16 * shift] for shift in shifts]
    assert lengths_at(cut, 16_000) == [[8_000 + 16 * min(shift, 0)] for shift in shifts]
    assert min(shifts) < 0 < max(shifts)
    decoder.close()
    short.close()


def test_long_clips_come_in_smaller_batches(build_dataset: Callable, make_noises: Callable) -> None:
    seconds = (0.2, 25.0, 0.2, 0.2, 12.0)
    clips = [(f"clip{number}", *make_noises(1, 5, seconds=one)[0][1:]) for number, one in enumerate(seconds)]
    clips[3] = ("essay", (0,), b"To be, or not to be")
    manifest = build_dataset("data", clips)
    decoder = decoder_of(manifest, sample_rates_hz=(16_000,), seconds=float("inf"), batch_size=5)
    batches = list(decoder.batches(FIRST))
    assert [batch.rows for batch in batches] == [[0, 1], [2, 4]]
    assert [batch.seconds for batch in batches] == [25.0, 12.0]
    assert [list(batch.failures) for batch in batches] == [[3], []]
    decoder.close()
    ordinary = decoder_of(manifest, seconds=10.0, batch_size=5)
    assert [batch.rows for batch in ordinary.batches(FIRST)] == [[0, 1, 2, 4]]
    ordinary.close()


def lost(decoder: ShardDecoder, end: signal.Signals) -> str:
    """Send a signal to the process that decodes, and give what whoever waits for it is told."""
    batches = decoder.batches(FIRST, following=SECOND)
    next(batches)
    [child] = decoding_processes()
    assert decoder._pool is not None
    decoder._pool._patience = 0.5  # from now on: starting a process may take long on a busy machine
    child.send_signal(end)
    with pytest.raises(LostProcessError) as raised:
        list(batches)
    assert not child.is_running()
    return str(raised.value)


@pytest.mark.parametrize(
    ("end", "words"),
    [
        (signal.SIGKILL, r"was killed \(SIGKILL\).* its clip is \S+ of tiny-00000\d.tar. Give the machine more memory"),
        (signal.SIGSTOP, r"no sign of life for 0.5 s: it is stopped, by SIGSTOP.* its clip is \S+ of tiny-00000\d.tar"),
    ],
)
def test_lost_process_is_named_with_clip_and_shard_and_the_next_shard_gets_another(
    build_dataset: Callable, make_noises: Callable, end: signal.Signals, words: str
) -> None:
    manifest = build_dataset("data", make_noises(40, 5), clips_per_shard=20)
    decoder = decoder_of(manifest, batch_size=1)
    told = lost(decoder, end)
    assert re.search(words, told), told
    assert [batch.rows for batch in decoder.batches(SECOND)] == [[row] for row in range(20, 40)]
    decoder.close()


def test_what_nobody_asks_for_any_more_takes_no_room(build_dataset: Callable, make_noises: Callable) -> None:
    decoder = decoder_of(build_dataset("data", make_noises(40, 5), clips_per_shard=20))
    for _ in range(4):
        next(decoder.batches(FIRST, following=SECOND))
    assert [batch.rows for batch in decoder.batches(SECOND)] == [[row, row + 1] for row in range(20, 40, 2)]
    decoder.close()
    assert not decoding_processes()


def test_a_process_that_decodes_needs_neither_torch_nor_arrow(manifest: Manifest) -> None:
    reader = ShardReader(manifest.clips, sample_rates_hz=(16_000,), seconds=1.0, views=None)
    with DecodingPool(1) as pool:
        [modules] = pool.load(TellingReader(reader), [[0, 1]])
    assert not modules & {"torch", "pyarrow", "ray"}


def test_a_clip_longer_than_its_room_comes_all_the_same(build_dataset: Callable, make_noises: Callable) -> None:
    manifest = build_dataset("data", make_noises(1, 5, seconds=70.0))
    decoder = decoder_of(manifest, sample_rates_hz=(8_000,), seconds=float("inf"))
    [batch] = decoder.batches(FIRST)
    assert batch.views[0].waveforms[8_000].shape == (1, 560_000)
    decoder.close()
