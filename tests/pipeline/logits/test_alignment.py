import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.logits.alignment import load_aligned, target_rows, write_aligned


def test_each_store_row_finds_its_clip_and_strangers_find_none() -> None:
    rows, repeated = target_rows(pa.chunked_array([["c", "x"], ["a"]]), pa.array(["a", "b", "c"]))
    assert rows.tolist() == [2, -1, 0]
    assert repeated == 0


def test_first_of_several_rows_of_a_clip_counts() -> None:
    rows, repeated = target_rows(pa.chunked_array([["b", "a"], ["a", "b", "z"], ["b"]]), pa.array(["a", "b"]))
    assert rows.tolist() == [1, 0, -1, -1, -1, -1]
    assert repeated == 3


def test_clip_ids_match_whole_and_by_case() -> None:
    rows, _ = target_rows(pa.chunked_array([["-a", "A", "a ", ""]]), pa.array(["a"]))
    assert rows.tolist() == [-1, -1, -1, -1]


def test_array_crosses_to_another_process_by_its_path(tmp_path: Path) -> None:
    logits = np.arange(6, dtype=np.float16).reshape(3, 2)
    pieces = [(np.array([2]), logits[2:]), (np.array([0]), logits[:1])]
    path = tmp_path / "logits.npy"
    written = write_aligned(path, (3, 2), np.array([True, False, True]), 1, pieces)
    message = pickle.dumps(written)
    assert len(message) < 1000
    for aligned in (written, pickle.loads(message)):
        assert isinstance(aligned.logits, np.memmap)
        np.testing.assert_array_equal(aligned.logits, [[0, 1], [0, 0], [4, 5]])
        assert aligned.has_logits.tolist() == [True, False, True]
        assert aligned.repeated == 1


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the kernel does not say what is mapped")
def test_logits_that_were_taken_do_not_stay_in_the_process(tmp_path: Path) -> None:
    values = (np.arange(4_000_000) % 1000).reshape(4000, 1000).astype(np.float16)  # 8 MB
    path = tmp_path / "logits.npy"
    aligned = write_aligned(path, values.shape, np.ones(4000, bool), 0, [(np.arange(4000), values)])
    np.testing.assert_array_equal(aligned.take(np.arange(3999, 0, -2)), values[3999:0:-2])
    mapped = Path("/proc/self/smaps").read_text().split(f"{path.parent}")[1:]
    assert mapped
    resident = [int(line.split()[1]) for entry in mapped for line in entry.splitlines() if line.startswith("Rss:")]
    assert resident[0] < 1000  # kB


def test_interrupted_write_leaves_no_array(tmp_path: Path) -> None:
    def pieces():
        yield np.array([0]), np.zeros((1, 2), np.float16)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_aligned(tmp_path / "logits.npy", (3, 2), np.zeros(3, bool), 0, pieces())
    with pytest.raises(FileNotFoundError):
        load_aligned(tmp_path / "logits.npy")
