import numpy as np
import pytest

from pipeline.decoding.shared_memory import Arena, Blocks, map_shared, share_object


def test_arrays_made_in_an_arena_are_not_copied_and_others_join_them() -> None:
    blocks = Blocks(1, 4096)
    offset = blocks.take()
    assert offset == 0
    arena = Arena(blocks.view(0))
    made = arena.empty((4, 5), np.float32)
    made[:] = np.arange(20).reshape(4, 5)
    packed = arena.pack(
        {"made": made, "ordinary": np.arange(3), "part": made[1:3], "none": np.empty((0, 7)), "word": "x"}
    )
    assert len(packed.payload) < 500
    found = packed.unpack(blocks.lend(0))
    np.testing.assert_array_equal(found["made"], made)
    np.testing.assert_array_equal(found["ordinary"], np.arange(3))
    np.testing.assert_array_equal(found["part"], made[1:3])
    assert found["none"].shape == (0, 7)
    made[0, 0] = 99
    assert found["made"][0, 0] == 99


def test_what_does_not_fit_travels_in_the_message() -> None:
    blocks = Blocks(1, 4096)
    arena = Arena(blocks.view(0))
    large = arena.empty((3000,), np.int64)
    large[:] = 7
    columns = np.arange(600).reshape(20, 30).T  # not in one piece, as pickle wants it
    found = arena.pack([large, columns]).unpack(blocks.lend(0))
    np.testing.assert_array_equal(found[0], large)
    np.testing.assert_array_equal(found[1], columns)


def test_a_block_is_free_once_nobody_looks_at_any_part_of_it() -> None:
    blocks = Blocks(2, 100)
    first, second = blocks.take(), blocks.take()
    assert first is not None
    assert second is not None
    assert blocks.take() is None
    part = np.frombuffer(blocks.lend(first), np.uint8)[10:20].view(np.int16)
    assert (blocks.lent, blocks.take()) == (1, None)
    del part
    assert (blocks.lent, blocks.take()) == (0, first)


def test_a_shared_object_s_arrays_lie_in_the_file_and_nobody_else_may_change_them() -> None:
    packed, file = share_object({"table": np.arange(100_000), "name": "x"})
    assert len(packed.payload) < 500
    found = packed.unpack(map_shared(file.path))
    np.testing.assert_array_equal(found["table"], np.arange(100_000))
    with pytest.raises(ValueError, match="read-only"):
        found["table"][0] = 1
    file.close()
    assert found["table"][-1] == 99_999
