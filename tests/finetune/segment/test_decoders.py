"""Decoders: counts by closed forms, UNETR by MONAI's own, and that every pixel is answered where it lies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vits import pictures, small

from miram.engine.errors import UserError
from miram.finetune.peft import apply
from miram.finetune.segment.decoders import EncoderDecoder, Light, Linear, Unetr
from miram.finetune.segment.taps import Taps

DECODERS: dict[str, tuple[Any, dict[str, int]]] = {
    "linear": (Linear, {}),
    "light": (Light, {"width": 32}),
    "unetr": (Unetr, {"feature_size": 4}),
}


def count(module: nn.Module) -> int:
    return sum(tensor.numel() for tensor in module.parameters())


def make(name: str, patch: int = 16, dim: int = 12, in_chans: int = 1, K: int = 2, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    kind, options = DECODERS[name]
    return kind(dim, (patch, patch), in_chans, K, **options).double().eval()


def inputs(grid: tuple[int, int], patch: int = 16, dim: int = 12, channels: int = 1) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    size = (2, channels, grid[0] * patch, grid[1] * patch)
    maps = [torch.randn(2, dim, *grid, generator=generator).double() for _ in range(4)]
    return torch.randn(size, generator=generator).double(), maps


# ---------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("patch", [4, 7, 8, 14, 16, 32])
@pytest.mark.parametrize("name", ["linear", "light"])
def test_any_patch_and_any_shape_gives_logits_of_every_pixel(name: str, patch: int) -> None:
    images, maps = inputs((3, 5), patch, channels=3)
    logits = make(name, patch, in_chans=3, K=4)(images, maps)
    assert logits.shape == (2, 4, 3 * patch, 5 * patch)
    assert logits.isfinite().all()


@pytest.mark.parametrize("dim", [384, 768])  # ViT-S and ViT-B
def test_counts_are_those_of_small_decoders(dim: int) -> None:
    with torch.device("meta"):
        of = {name: count(kind(dim, (16, 16), 1, 2)) for name, (kind, _) in DECODERS.items()}
        one_class = count(Unetr(dim, (16, 16), 1, 1))
    assert of["linear"] == 4 * dim * 2 + 2
    assert 4.0e6 < of["light"] < 6.0e6
    assert one_class == pytest.approx({384: 4.33e6, 768: 5.41e6}[dim], rel=2e-3)  # MONAI's UNETR without its ViT


def test_unetr_computes_what_monai_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    from monai.networks.nets import unetr

    torch.manual_seed(0)
    monkeypatch.setattr(unetr, "ViT", Said)
    theirs = unetr.UNETR(
        3, 4, (64, 32), feature_size=4, hidden_size=12, mlp_dim=24, num_heads=3, spatial_dims=2
    ).double()
    ours = make("unetr", in_chans=3, K=4)
    names = {"image": "encoder1", "head": "out"}
    names |= {f"skips.{i}": f"encoder{i + 2}" for i in range(3)} | {f"ups.{i}": f"decoder{i + 2}" for i in range(4)}
    for own, name in names.items():
        ours.get_submodule(own).load_state_dict(theirs.get_submodule(name).state_dict())
    images, maps = inputs((4, 2), channels=3)
    tokens = [m.flatten(2).transpose(1, 2) for m in maps]
    hidden = {block: tokens[i] for i, block in enumerate((3, 6, 9))}
    theirs.vit.answer = tokens[3], hidden
    assert torch.allclose(ours(images, maps), theirs(images), atol=1e-12)
    assert count(ours) == count(theirs)


class Said(nn.Module):
    """In the place of a ViT: says the same whatever it is asked."""

    def __init__(self, **_: Any):
        super().__init__()
        self.answer: Any = None

    def forward(self, _: Tensor) -> Any:
        return self.answer


def test_unetr_refuses_patches_that_four_doublings_do_not_come_from() -> None:
    with pytest.raises(UserError, match=r"unetr needs patches of 16 x 16.*choose light"):
        make("unetr", patch=14)


# ---------------------------------------------------------------------------------------------- places


def mirrored(module: nn.Module) -> nn.Module:
    """Every kernel made its own mirror image, up-down and left-right."""
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.Conv2d):
                part.weight.copy_((part.weight + part.weight.flip(-1)) / 2)
                part.weight.copy_((part.weight + part.weight.flip(-2)) / 2)
    return module


@pytest.mark.parametrize("patch", [4, 8, 16, 32])
@pytest.mark.parametrize("dims", [(-1,), (-2,), (-2, -1)])
@pytest.mark.parametrize("name", ["linear", "light"])
@torch.no_grad()
def test_nothing_is_shifted_by_a_fraction_of_a_pixel(name: str, dims: tuple[int, ...], patch: int) -> None:
    """With mirrored kernels a mirrored input gives the mirrored output, unless some level lies off its place."""
    images, maps = inputs((4, 3), patch)
    decoder = mirrored(make(name, patch))
    there = decoder(images, maps).flip(dims)
    back = decoder(images.flip(dims), [m.flip(dims) for m in maps])
    assert torch.allclose(there, back, atol=1e-11)


def spreading(module: nn.Module) -> nn.Module:
    """No norms, no GELUs, and every kernel a positive bell: what goes in is only spread, evenly to all sides."""
    bell = torch.tensor([1.0, 2, 1]).double().outer(torch.tensor([1.0, 2, 1]).double())
    for path, part in list(module.named_modules()):
        if isinstance(part, nn.GroupNorm | nn.GELU):
            module.set_submodule(path, nn.Identity())
        elif isinstance(part, nn.Conv2d):
            part.weight.data = part.weight.data.sum((2, 3), keepdim=True).abs()
            part.weight.data = part.weight.data * (bell if part.kernel_size == (3, 3) else 1)
    return module


@pytest.mark.parametrize("place", [(4, 6), (6, 4), (5, 7)])
@pytest.mark.parametrize("patch", [8, 14, 16])
@pytest.mark.parametrize("name", ["linear", "light"])
@torch.no_grad()
def test_what_a_patch_says_is_said_over_that_patch(name: str, patch: int, place: tuple[int, int]) -> None:
    decoder = spreading(make(name, patch))
    image = torch.zeros(1, 1, 11 * patch, 12 * patch).double()
    maps = [torch.zeros(1, 12, 11, 12).double() for _ in range(4)]
    quiet = decoder(image, maps)
    for m in maps:
        m[:, :, place[0], place[1]] = 1.0
    answer = (decoder(image, maps) - quiet)[0, 1]
    peak = divmod(int(answer.argmax()), 12 * patch)
    assert (peak[0] // patch, peak[1] // patch) == place
    for side, i in enumerate(place):
        pixels = torch.arange(answer.shape[side]).double() + 0.5
        centre = pixels @ answer.sum(1 - side) / answer.sum()
        assert abs(centre - (i + 0.5) * patch) < 0.1


@torch.no_grad()
def test_an_image_pixel_is_answered_at_that_pixel() -> None:
    decoder = mirrored(make("light"))
    maps = [torch.zeros(1, 12, 8, 8).double()] * 4
    quiet = 0.1 * torch.randn(1, 1, 128, 128, generator=torch.Generator().manual_seed(2)).double()
    for place in ((40, 71), (77, 30)):
        loud = quiet.clone()
        loud[0, 0, place[0], place[1]] += 3
        answer = (decoder(loud, maps) - decoder(quiet, maps)).abs().sum(1)[0]
        peak = divmod(int(answer.argmax()), 128)
        assert max(abs(a - b) for a, b in zip(peak, place, strict=True)) <= 1


def test_without_an_encoder_light_still_learns_to_mark_single_pixels() -> None:
    torch.manual_seed(0)
    decoder = Light(12, (16, 16), 1, 2, width=32)
    generator = torch.Generator().manual_seed(3)
    mask = (torch.rand(4, 64, 64, generator=generator) < 0.01).long()
    images = mask[:, None] + 0.3 * torch.rand(4, 1, 64, 64, generator=generator)
    maps = [torch.zeros(4, 12, 4, 4)] * 4
    optimizer = torch.optim.Adam(decoder.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(decoder(images, maps), mask, weight=torch.tensor([1.0, 20.0])).backward()
        optimizer.step()
    said = decoder(images, maps).argmax(1)
    assert 2 * (said * mask).sum() / (said.sum() + mask.sum()) > 0.95


def test_linear_answers_nothing_of_the_image_itself() -> None:
    images, maps = inputs((3, 3))
    assert torch.equal(make("linear")(images, maps), make("linear")(-images, maps))


@torch.no_grad()
def test_linear_is_linear_in_the_features() -> None:
    decoder, (images, a), (_, b) = make("linear"), inputs((3, 3)), inputs((3, 3))
    b = [m.flip(0) for m in b]
    decoder.train()(images, a)  # so that the running statistics are of something
    decoder.eval()
    middle = decoder(images, [(x + y) / 2 for x, y in zip(a, b, strict=True)])
    assert torch.allclose(middle, (decoder(images, a) + decoder(images, b)) / 2, atol=1e-12)


# ---------------------------------------------------------------------------------------------- with an encoder


@pytest.mark.parametrize("name", DECODERS)
def test_gradients_reach_what_learns_and_no_frozen_encoder(name: str) -> None:
    kind, options = DECODERS[name]
    for method in ("linear", "lora"):
        vit = small()
        images = pictures(vit)
        model = EncoderDecoder(Taps(apply(vit, method)), kind(48, (16, 16), 1, 2, **options)).train()
        model(images).square().mean().backward()
        learns = {n for n, tensor in model.named_parameters() if tensor.grad is not None and tensor.grad.any()}
        assert {n for n in learns if n.startswith("taps.")} == {
            n for n, _ in model.named_parameters() if method == "lora" and "lora_B" in n
        }, "A has no gradient as long as B is zero"
        assert {n for n in learns if n.startswith("decoder.")} >= {
            n for n, tensor in model.named_parameters() if n.startswith("decoder.") and tensor.dim() > 1
        }


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_zeroed_maps_take_the_encoder_out_of_the_answer(name: str) -> None:
    kind, options = DECODERS[name]
    answers: dict[bool, list[Tensor]] = {True: [], False: []}
    for zeroed, found in answers.items():
        for seed in (0, 1):
            torch.manual_seed(7)
            decoder = kind(48, (16, 16), 1, 2, **options)
            vit = small(seed=seed)
            found.append(EncoderDecoder(Taps(apply(vit, "linear"), zeroed=zeroed), decoder).eval()(pictures(vit)))
    assert torch.equal(*answers[True])
    assert not torch.allclose(*answers[False])
