import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import teacher
from pipeline.models.device import fastest_precision
from teacher.inference import InferenceLinear, optimise_for_inference


def tiny(name: str = "passt_tiny") -> teacher.AudioTransformer:
    torch.manual_seed(0)
    return teacher.create_model(name, num_classes=7).eval()


@pytest.mark.parametrize("name", ["passt_tiny", "ast_tiny"])
def test_float32_answers_change_by_rounding_errors_alone(name: str, clips: Callable[..., Tensor]) -> None:
    model = tiny(name)
    with torch.inference_mode():
        features = model.front_end(clips(model.sample_rate_hz))
        before = model(features)
        optimise_for_inference(model, torch.float32)
        torch.testing.assert_close(model(features), before, rtol=0, atol=2e-6)


def test_only_the_products_of_the_blocks_run_in_lower_precision() -> None:
    model = tiny()
    optimise_for_inference(model, torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not [layer for layer in model.blocks.modules() if isinstance(layer, nn.Linear)]
    layers = [layer for layer in model.blocks.modules() if isinstance(layer, InferenceLinear)]
    assert len(layers) == 4 * model.config.depth
    assert {layer.weight.dtype for layer in layers} == {torch.bfloat16}
    between: list[torch.dtype] = []
    for block in model.blocks:
        block.register_forward_hook(lambda *parts: between.append(parts[2].dtype))
    with torch.inference_mode():
        assert model(model.front_end(torch.zeros(1, 320000))).dtype == torch.float32
    assert between == [torch.float32] * model.config.depth


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_packed_weights_give_what_plain_ones_give(precision: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    linear, values = nn.Linear(96, 40), torch.randn(3, 5, 96)
    packed = InferenceLinear(linear, precision)
    monkeypatch.setattr("teacher.inference._can_pack", lambda weight: False)  # as another processor or torch may say
    plain = InferenceLinear(linear, precision)
    assert not plain.is_packed
    with torch.inference_mode():
        assert packed(values).dtype == plain(values).dtype == precision
        torch.testing.assert_close(packed(values), plain(values))
        torch.testing.assert_close(plain(values).float(), linear(values), rtol=0.02, atol=0.02)


def test_a_network_keeps_the_precision_that_it_was_made_ready_for() -> None:
    model = tiny()
    optimise_for_inference(model, torch.bfloat16)
    with pytest.raises(ValueError, match=r"holds its weights in torch.bfloat16 already, not in torch.float32"):
        optimise_for_inference(model, torch.float32)


@pytest.mark.parametrize("name", ["passt_tiny", "ast_tiny"])
def test_clips_that_go_through_the_blocks_in_pieces_answer_the_same(
    name: str, clips: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(name)
    sizes: list[int] = []
    model.blocks[0].register_forward_hook(lambda *parts: sizes.append(len(parts[2])))
    with torch.inference_mode():
        features = model.front_end(clips(model.sample_rate_hz).repeat(2, 1)[:3])
        whole = model(features)
        monkeypatch.setattr("teacher.audio_transformer._TOKENS_AT_ONCE", 300)
        torch.testing.assert_close(model(features), whole, rtol=0, atol=2e-6)
    assert sizes[0] == 3
    assert sum(sizes[1:]) == 3
    assert len(sizes) > 2


ASK_AND_TELL_PEAK = """
import torch, teacher
from pipeline.runtime.memory import keep_freed_memory
keep_freed_memory()
def peak():
    [line] = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024
before = peak()
names = ["passt_s_swa_p16_128_ap476", "ast_base_p16_s10"]
ensemble = teacher.Ensemble((teacher.create_model(name) for name in names), [1, 1], torch.bfloat16)
loaded = peak()
for member in ensemble.members:
    member.blocks = member.blocks[:2]  # a third block would use the memory of the second again
ensemble({32000: torch.zeros(8, 320000), 16000: torch.zeros(8, 160000)})
print(before, loaded, peak())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells a process's peak memory")
@pytest.mark.skipif(fastest_precision("cpu") != "bfloat16", reason="this CPU has no instructions for bfloat16")
def test_memory_of_passt_s_and_ast_is_their_weights_once_and_a_bounded_rest() -> None:
    done = subprocess.run([sys.executable, "-c", ASK_AND_TELL_PEAK], check=True, capture_output=True, text=True)
    before, loaded, peak = map(float, done.stdout.split())  # MiB
    # 2 x 165 MiB in bfloat16, and one model's 330 MiB in float32 while it is made smaller.
    assert loaded - before < 950
    assert peak - before < 1500
