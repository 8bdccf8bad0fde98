"""A fused student gives the same tags as the one that it was made from."""

import pytest
import torch
from torch import nn

from student import create_model, fuse, fuse_in_place


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(2, 1, 128, 200, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("golden", "name"), [("mn04", "mn04"), ("mn10", "mn10_as"), ("mn10_fc", "mn10_as_fc"), ("dymn10", "dymn10_as")]
)
def test_fused_logits_are_those_of_the_model(golden_weights, images, golden, name) -> None:
    model = create_model(name, golden_weights(golden)).eval()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    fused = fuse(model.train())
    assert model.training
    assert not fused.training
    model.eval()
    with torch.inference_mode():
        expected = model(images)
        torch.testing.assert_close(fused(images), expected, atol=float(1e-4 * expected.std()), rtol=0)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["mn04", "dymn04"])
def test_a_model_that_nobody_needs_as_it_is_is_not_copied(images, name) -> None:
    model = create_model(name)
    copy = fuse(model)
    assert fuse_in_place(model) is model
    with torch.inference_mode():
        assert torch.equal(model(images), copy(images))


@pytest.mark.parametrize("options", [{"se_dims": "cft"}, {"head_type": "multihead_attention_pooling"}])
def test_no_batch_norm_is_left(images, options) -> None:
    model = create_model("mn04", num_classes=5, input_dim_t=200, **options)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:  # untrained statistics would fold to nothing
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.normal_(norm.bias)
        norm.running_mean.normal_()  # pyright: ignore[reportOptionalMemberAccess]
        norm.running_var.uniform_(0.5, 2)  # pyright: ignore[reportOptionalMemberAccess]
    fused = fuse(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    with torch.inference_mode():
        expected = model.eval()(images)
        torch.testing.assert_close(fused(images), expected, atol=float(1e-4 * expected.std()), rtol=0)


def test_a_fused_model_takes_sounds_of_any_precision(images) -> None:
    fused = fuse(create_model("mn04"))
    with torch.autocast("cpu", torch.bfloat16):
        logits = fused(images)  # outside of inference mode, where gradients would be kept
        assert logits.isfinite().all()
        with torch.inference_mode():
            torch.testing.assert_close(fused(images), logits)
