from pathlib import Path

import pytest

from benchmarks.gpu import main


@pytest.mark.ray
def test_the_gpu_benchmark_runs_small_on_any_machine_and_writes_its_tables(tmp_path: Path) -> None:
    main(["--small", "--device", "cpu", "--out", str(tmp_path / "tables.md")])
    tables = (tmp_path / "tables.md").read_text()
    parts = ("limit", "teacher", "dearest of passt_tiny", "from shards", "stage 1", "epochs of mn01", "student")
    assert [part for part in parts if f"| {part} |" not in tables] == []
    assert "through Ray" in tables
