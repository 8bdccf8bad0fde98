import gc
import sys
from pathlib import Path

import pytest

from pipeline.runtime.imports import lasting_imports


@pytest.fixture(autouse=True)
def thaw():
    yield
    gc.unfreeze()


def test_what_is_imported_is_never_searched_for_garbage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "made_of_many.py").write_text("things = [[number] for number in range(5000)]\n")
    monkeypatch.syspath_prepend(tmp_path)
    searches = []
    gc.callbacks.append(lambda phase, _: searches.append(phase))
    try:
        with lasting_imports():
            searches.clear()
            import made_of_many  # pyright: ignore[reportMissingImports]
    finally:
        gc.callbacks.pop()
    assert searches == []
    assert gc.isenabled()
    assert gc.get_freeze_count() >= len(made_of_many.things)
    sys.modules.pop("made_of_many")


def test_a_block_that_imports_nothing_new_takes_nothing_out_of_the_search() -> None:
    frozen = gc.get_freeze_count()
    with lasting_imports():
        import json  # noqa: F401
    assert gc.get_freeze_count() == frozen


def test_whoever_searches_for_no_garbage_is_left_alone() -> None:
    gc.disable()
    try:
        with lasting_imports():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_module_that_fails_does_not_end_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "failing_module.py").write_text("raise ImportError('no such library')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="no such library"), lasting_imports():
        import failing_module  # noqa: F401  # pyright: ignore[reportMissingImports]
    assert gc.isenabled()
