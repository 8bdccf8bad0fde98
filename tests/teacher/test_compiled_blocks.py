"""Compiled blocks: the logits of the plain ones, for the shape that comes again, and nothing lost where that fails."""

from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from teacher import Ensemble, create_model

Backend = Callable[[Any, Any], Callable[..., Any]]


def tiny(name: str = "passt_tiny") -> nn.Module:
    torch.manual_seed(0)
    return create_model(name, num_classes=7)


def first(ensemble: Ensemble) -> Any:
    return ensemble.members[0]


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Lets each test compile by itself."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def compiled_by(monkeypatch: pytest.MonkeyPatch) -> Callable[[Backend], None]:
    """Puts another translator in the place of torch's, which takes long."""
    compile_module = nn.Module.compile

    def use(backend: Backend) -> None:
        monkeypatch.setattr(nn.Module, "compile", lambda block, **how: compile_module(block, backend=backend, **how))

    return use


@pytest.fixture
def counted(compiled_by: Callable[[Backend], None]) -> list[int]:
    """Clips of each sequence that went through a translated block."""
    sizes: list[int] = []

    def count(graph: Any, inputs: Any) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            sizes.append(next(one.shape[0] for one in given if isinstance(one, Tensor) and one.dim() == 3))
            return graph(*given)

        return run

    compiled_by(count)
    return sizes


def test_torch_compile_on_this_processor_changes_logits_within_the_precision(clips: Callable[..., Tensor]) -> None:
    plain, compiled = (Ensemble([tiny()], [1], torch.bfloat16, compiled=some) for some in (False, True))
    rate = plain.sample_rates_hz[0]
    sounds = {rate: clips(rate)[:2]}
    expected = plain(sounds)
    found = [compiled(sounds) for _ in range(3)]
    assert first(compiled).transform._compiled is not None, "it was translated"
    for one in found:
        torch.testing.assert_close(one, expected, rtol=0, atol=0.02)


def test_the_shape_that_comes_again_is_compiled_and_a_last_batch_of_fewer_clips_is_not(
    clips: Callable[..., Tensor], counted: list[int]
) -> None:
    plain, compiled = Ensemble([tiny()], [1]), Ensemble([tiny()], [1], compiled=True)
    rate = plain.sample_rates_hz[0]
    sounds, last = {rate: clips(rate)[:2]}, {rate: clips(rate)[:1]}
    depth = len(first(compiled).blocks)
    compiled(sounds)
    assert not counted, "nobody knows yet whether there are more of these"
    compiled(sounds)
    compiled(last)
    torch.testing.assert_close(compiled(last), plain(last), rtol=0, atol=2e-6)
    assert counted == [2] * depth, "once, to see whether it gives the same"
    torch.testing.assert_close(compiled(sounds), plain(sounds), rtol=0, atol=2e-6)
    assert counted == [2] * 2 * depth


def test_each_member_of_an_ensemble_has_its_own_shape(clips: Callable[..., Tensor], counted: list[int]) -> None:
    members = [tiny("passt_tiny"), tiny("ast_tiny")]
    plain = Ensemble([tiny("passt_tiny"), tiny("ast_tiny")], [1, 1])
    compiled = Ensemble(members, [1, 1], compiled=True)
    sounds = {rate: clips(rate)[:2] for rate in compiled.sample_rates_hz}
    for _ in range(3):
        found = compiled(sounds)
    torch.testing.assert_close(found, plain(sounds), rtol=0, atol=2e-6)
    assert len(counted) == 2 * sum(len(cast("Any", member).blocks) for member in members)


def test_blocks_that_cannot_be_compiled_run_as_they_are_and_a_line_says_so_once(
    clips: Callable[..., Tensor], compiled_by: Callable[[Backend], None], caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(graph: Any, inputs: Any) -> Callable[..., Any]:
        raise RuntimeError("no compiler: gcc is not installed")

    compiled_by(refuse)
    plain, compiled = Ensemble([tiny()], [1]), Ensemble([tiny()], [1], compiled=True)
    rate = plain.sample_rates_hz[0]
    sounds = {rate: clips(rate)[:2]}
    for _ in range(4):
        torch.testing.assert_close(compiled(sounds), plain(sounds), rtol=0, atol=2e-6)
    [said] = [record.getMessage() for record in caplog.records if record.name.startswith("teacher")]
    assert said.startswith("passt_tiny: can't be compiled here, and runs as it is (")
    assert "gcc is not installed" in said


def test_blocks_that_are_compiled_wrongly_are_not_used(
    clips: Callable[..., Tensor], compiled_by: Callable[[Backend], None], caplog: pytest.LogCaptureFixture
) -> None:
    compiled_by(lambda graph, inputs: lambda *given: [one * 1.5 for one in graph(*given)])
    plain, compiled = Ensemble([tiny()], [1]), Ensemble([tiny()], [1], compiled=True)
    rate = plain.sample_rates_hz[0]
    sounds = {rate: clips(rate)[:2]}
    for _ in range(4):
        torch.testing.assert_close(compiled(sounds), plain(sounds), rtol=0, atol=2e-6)
    assert "compiled blocks change logits by" in caplog.text


def test_memory_that_does_not_suffice_while_compiling_halves_the_batch(
    clips: Callable[..., Tensor], compiled_by: Callable[[Backend], None]
) -> None:
    def translate(graph: Any, inputs: Any) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            if max(one.shape[0] for one in given if isinstance(one, Tensor) and one.dim() == 3) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
            return graph(*given)

        return run

    compiled_by(translate)
    plain, compiled = Ensemble([tiny()], [1]), Ensemble([tiny()], [1], compiled=True)
    rate = plain.sample_rates_hz[0]
    sounds = {rate: clips(rate)[:2]}
    for _ in range(4):
        torch.testing.assert_close(compiled(sounds), plain(sounds), rtol=0, atol=2e-6)
    assert compiled.largest_batch == 1
    assert first(compiled).transform._compiled[0] == 1
