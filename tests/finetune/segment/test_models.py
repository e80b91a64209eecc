"""Segmenters by name: what every one must do, what its options are, and what is refused."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn
from vits import small

from miram.engine.errors import UserError
from miram.finetune.peft import apply
from miram.finetune.peft.base import Tuned
from miram.finetune.segment.mdsa_unet import RELEASED
from miram.finetune.segment.mdsa_unet import MDSAUNet as Network
from miram.finetune.segment.models import MODELS, NEEDS_ENCODER, MDSAUNet, build, read_model

OPTIONS: dict[str, dict[str, Any]] = {
    "linear": {},
    "light": {"width": 32},
    "unetr": {"feature_size": 4},
    "mdsa_unet": {"dims": [32, 32, 64], "topks": [1, 2, 4]},
    "unet": {"channels": [4, 4, 8, 8, 16]},
}
every = pytest.mark.parametrize("name", MODELS)


def encoder(name: str, method: str = "lora", **how: Any) -> Tuned | None:
    return apply(small(**how), method) if name in NEEDS_ENCODER else None


def made(name: str, num_classes: int = 2, channels: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return build(name, OPTIONS[name], encoder(name, in_chans=channels), channels, num_classes)


def images(count: int = 2, channels: int = 1, size: tuple[int, int] = (64, 64)) -> torch.Tensor:
    return torch.randn(count, channels, *size, generator=torch.Generator().manual_seed(1))


def test_every_model_is_known() -> None:
    assert set(MODELS) == set(OPTIONS) == {"linear", "light", "unetr", "mdsa_unet", "unet"}
    assert set(NEEDS_ENCODER) == {"linear", "light", "unetr"}


@every
@pytest.mark.parametrize(("classes", "channels"), [(2, 1), (4, 3)])
@torch.no_grad()
def test_logits_are_of_every_pixel_and_foreground_is_rare_at_first(name: str, classes: int, channels: int) -> None:
    logits = made(name, classes, channels).train()(images(2, channels))
    assert logits.shape == (2, classes, 64, 64)
    probabilities = logits.softmax(1)
    assert 0.005 < 1 - probabilities[:, 0].mean() < 0.02
    if classes > 2:
        for foreground in range(1, classes):
            assert 0.3 < probabilities[:, foreground].mean() / (0.01 / 3) < 3


@every
@torch.no_grad()
def test_the_bias_alone_makes_foreground_one_in_a_hundred(name: str) -> None:
    model = made(name, 4).eval()
    nn.init.zeros_([part for part in model.modules() if isinstance(part, nn.Conv2d)][-1].weight)
    expected = torch.tensor([0.99, *[0.01 / 3] * 3])[:, None, None].expand(2, 4, 64, 64)
    assert torch.allclose(model(images()).softmax(1), expected, rtol=1e-5)


@every
def test_all_that_learns_gets_a_gradient_in_training(name: str) -> None:
    model = made(name).train()
    for _ in range(2):  # what stands behind lora's zeros has one from the second step on
        model.zero_grad()
        model(images()).square().mean().backward()
        with torch.no_grad():
            for tensor in model.parameters():
                if tensor.requires_grad:
                    tensor.sub_(0.05 * tensor.grad.sign())
    assert all((tensor.grad is not None) == tensor.requires_grad for tensor in model.parameters())


@every
@torch.no_grad()
def test_weights_read_back_give_the_same_logits(name: str) -> None:
    model, other = made(name).train(), made(name)
    model(images())  # moves the running statistics there are
    for tensor in model.parameters():
        tensor.add_(0.1)
    other.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(images()), other.eval()(images()))


@every
@torch.no_grad()
def test_half_precision_gives_about_the_same(name: str) -> None:
    model = made(name).eval()
    nn.init.normal_([part for part in model.modules() if isinstance(part, nn.Conv2d)][-1].weight)
    exact = model(images())
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(images())
    assert torch.corrcoef(torch.stack([exact.flatten(), rough.float().flatten()]))[0, 1] > 0.98


@pytest.mark.parametrize("size", [(9, 12), (17, 20), (33, 47), (64, 48)])
@pytest.mark.parametrize("name", sorted(MODELS.keys() - NEEDS_ENCODER))
def test_networks_of_their_own_take_any_size(name: str, size: tuple[int, int]) -> None:
    assert made(name).train()(images(size=size)).shape == (2, 2, *size)


@torch.no_grad()
def test_unet_pads_where_nothing_of_the_image_is() -> None:
    """A picture that goes on as its edge does gives what the picture alone gives."""
    model, small_one = made("unet").eval(), images(size=(48, 40))
    whole = nn.functional.pad(small_one, (0, 8, 0, 0), mode="replicate")
    assert torch.equal(model(small_one), model(whole)[..., :40])


def test_unet_says_more_where_there_is_more() -> None:
    """MONAI's UNet with residual units says the same on average of any image; this one does not."""
    model = made("unet").eval()
    nn.init.normal_(model.net.final_conv.weight, std=1.0)
    nothing, something = torch.zeros(1, 1, 64, 64), images(1)
    assert (model(nothing).mean((2, 3)) - model(something).mean((2, 3))).abs().max() > 0.05


# ---------------------------------------------------------------------------------------------- options


def test_options_of_mdsa_unet_are_its_arguments_with_their_defaults() -> None:
    wanted = dict(inspect.signature(Network.__init__).parameters)
    for given in ("self", "in_chans", "num_classes"):
        wanted.pop(given)
    fields = {name: field.default for name, field in MDSAUNet.model_fields.items() if name != "released"}
    assert fields == {name: parameter.default for name, parameter in wanted.items()}


def test_released_is_the_release_but_for_what_is_given() -> None:
    asked: list[dict[str, Any]] = []

    class Spy(Network):
        def __init__(self, *args: Any, **options: Any):
            asked.append(options)
            super().__init__(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("miram.finetune.segment.mdsa_unet.MDSAUNet", Spy)
        build("mdsa_unet", {"released": True, "dims": [32, 32, 64], "drop": "path"}, None, 1, 2)
        build("mdsa_unet", {"dims": [32, 32, 64]}, None, 1, 2)
    assert asked == [{**RELEASED, "dims": (32, 32, 64), "drop": "path"}, {"dims": (32, 32, 64)}]


def test_the_article_s_count_can_be_asked_for() -> None:
    model = build("mdsa_unet", {"mlp_ratios": [3, 2, 2]}, None, 3, 4)
    assert sum(tensor.numel() for tensor in model.parameters()) == 6_645_476


def test_layers_and_the_control_reach_the_taps() -> None:
    model = build("light", {"width": 16, "layers": [0, 1, 2, 3]}, encoder("light", depth=6), 1, 2, zeroed=True)
    assert model.taps.layers == (0, 1, 2, 3)
    assert model.taps.zeroed
    default = build("light", {"width": 16}, encoder("light", depth=6), 1, 2)
    assert default.taps.layers == (1, 2, 4, 5)
    assert not default.taps.zeroed


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("lihgt", {}, "there is no segmenter 'lihgt'; did you mean 'light'"),
        ("light", {"widht": 3}, "segment.model_options of light: widht is not a known key; did you mean 'width'"),
        ("light", {"width": "wide"}, "segment.model_options of light: width"),
        ("light", {"width": {3}}, "segment.model_options of light: .*plain numbers"),
        ("linear", {"width": 3}, "segment.model_options of linear: width is not a known key"),
        ("unetr", {"layers": [1, 2]}, "segment.model_options of unetr: layers"),
        ("unet", {"channels": [1, 2]}, "segment.model_options of unet: channels"),
        ("mdsa_unet", {"scale": "none"}, "segment.model_options of mdsa_unet: scale"),
    ],
)
def test_what_no_model_takes_is_refused_in_a_sentence(name: str, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        read_model(name, options)


def test_an_encoder_too_few_or_too_many_is_refused() -> None:
    with pytest.raises(UserError, match="light decodes what an encoder sees: name an encoder"):
        build("light", {}, None, 1, 2)
    with pytest.raises(UserError, match="unet is a network of its own"):
        build("unet", {}, encoder("light"), 1, 2)
    with pytest.raises(UserError, match="mdsa_unet is a network of its own"):
        build("mdsa_unet", {}, None, 1, 2, zeroed=True)
    with pytest.raises(UserError, match="layers must be 4 blocks from 0 to 1"):
        build("linear", {"layers": [0, 1, 2, 3]}, encoder("linear"), 1, 2)
    with pytest.raises(UserError, match="unetr needs patches of 16"):
        build("unetr", {}, encoder("unetr", patch_size=8), 1, 2)
