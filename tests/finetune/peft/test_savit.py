"""SAViT on ViTs and Swins against forwards written out from the encoder's own parts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor
from torch.nn import functional as F
from vits import VITS, pictures, small

from miram.engine.errors import UserError
from miram.finetune.peft import apply
from miram.finetune.peft.savit import Savit, SwinOverRegions, fit_window
from miram.finetune.savit.mixpool import mixed

LORA, NORM1, OUTER = 147_456, 18_432, 4_608


def swin(image: Any = 56, depths: tuple[int, ...] = (1, 2), window: int = 7, **options: Any) -> SwinTransformer:
    """Two stages, widths 12 and 24; 56 pixels are 7 x 7 tokens in the last one; random weights everywhere."""
    torch.manual_seed(0)
    sizes = {"embed_dim": 12, "depths": depths, "num_heads": (2, 4), "window_size": window, "img_size": image}
    model = timm.create_model("swin_base_patch4_window7_224", **(sizes | {"in_chans": 1, "num_classes": 0} | options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def learn(tuned: torch.nn.Module, seed: int = 0) -> None:
    """Put the low rank, which starts at nothing, and the norms somewhere."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))


def merged_weight(qkv: Any) -> Tensor:
    """W + B A in the thirds of q and k."""
    change, width = qkv.lora, qkv.weight.shape[0] // 3
    weight = qkv.weight.detach().clone()
    weight[:width] += change.B["q"] @ change.A["q"]
    weight[width : 2 * width] += change.B["k"] @ change.A["k"]
    return weight


def in_regions(x: Tensor, prior: Any, through: Callable[[Tensor, Tensor], Tensor], rows: list, columns: list) -> Tensor:
    """Four regions of (B, H, W, D) by hand, put back where they do not overlap or by their mean where they do."""
    done: list[Tensor] = []
    total, times = torch.zeros_like(x), torch.zeros(x.shape[1:3])[..., None]
    places = torch.arange(x.shape[1] * x.shape[2]).view(x.shape[1:3])
    for i, (r, c) in enumerate((r, c) for r in rows for c in columns):
        z = x[:, r, c]
        if i == 1:
            prompt = done[0]
        if i > 1:
            prompt = (0.7, 0.9)[i - 2] * prompt + (0.3, 0.1)[i - 2] * done[-1]
        done.append(prior.norm(through(z if i == 0 else 0.5 * z + 0.5 * prompt, places[r, c])))
        total[:, r, c] += done[-1]
        times[r, c] += 1
    return total / times


# ---------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("vit_base_patch16_224", {}, LORA + NORM1 + OUTER),
        ("vit_base_patch16_224", {"train_norm1": False}, LORA + OUTER),
        ("vit_base_patch16_224", {"rank": 8, "train_norm1": False}, 2 * LORA + OUTER),
        ("swin_base_patch4_window7_224", {}, 192_512 + 24_064 + 13_568),
        ("swin_base_patch4_window7_224", {"train_norm1": False}, 192_512 + 13_568),
    ],
)
def test_the_counts_are_those_of_the_paper(name: str, options: dict[str, Any], count: int) -> None:
    with torch.device("meta"):
        encoder = timm.create_model(name, num_classes=0).requires_grad_(False)
        method = Savit(**options)
        shape = method.shape(encoder)
        model = method.attach(encoder)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
    assert method.expected(shape) == count
    assert count in (170_496, 152_064, 299_520, 230_144, 206_080)


@pytest.mark.parametrize("kind", VITS)
@pytest.mark.parametrize("train_norm1", [True, False])
def test_it_counts_what_its_closed_form_does_on_every_kind_of_vit(kind: str, train_norm1: bool) -> None:
    tuned = apply(VITS[kind](), "savit", train_norm1=train_norm1, rank=3)
    assert tuned.trainable == tuned.expected
    features = tuned(pictures(tuned.model.encoder))
    assert features.shape == (2, 48)
    tokens = tuned.forward_features(pictures(tuned.model.encoder))
    assert tokens.shape == (2, tuned.shape.prefix + tuned.shape.N, 48)


# ---------------------------------------------------------------------------------------------- ViT


@pytest.mark.parametrize("learnt", [False, True])
def test_on_a_vit_it_is_the_forward_by_hand(learnt: bool) -> None:
    vit = small(depth=3)
    own, x = copy.deepcopy(vit), pictures(vit)
    tuned = apply(vit, "savit")
    if learnt:
        learn(tuned)
        for block, changed in zip(own.blocks, vit.blocks, strict=True):
            block.norm1.load_state_dict(changed.norm1.state_dict())
            block.attn.qkv.weight.data = merged_weight(changed.attn.qkv)
        own.norm.load_state_dict(vit.norm.state_dict())
    grid = (own.patch_embed(x) + own.pos_embed[:, 1:]).view(2, 4, 4, 48)

    def through(z: Tensor, _: Tensor) -> Tensor:
        return own.blocks[1](own.blocks[0](z.flatten(1, 2))).view(z.shape)

    half = [slice(0, 2), slice(2, 4)]
    whole = in_regions(grid, tuned.model.prior, through, half, half)
    torch.testing.assert_close(tuned.forward_features(x), whole.flatten(1, 2), rtol=1e-4, atol=1e-5)
    tokens = own.blocks[2](mixed(whole, (2, 2)).flatten(1, 2))
    features = own.norm(tuned.model.mixpool.norm(tokens).mean(1))
    torch.testing.assert_close(tuned(x), features, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", VITS)
def test_a_region_is_what_the_encoders_block_gives_that_sees_the_region_alone(kind: str) -> None:
    """The whole grid through timm's own block, with a mask that keeps regions apart; its positions are the grid's."""
    vit = VITS[kind]()
    own, x = copy.deepcopy(vit), pictures(vit)
    tuned = apply(vit, "savit")
    grid, rope = tuned.model.embed(x)
    _, H, W, _ = grid.shape
    r, c = slice(H // 2, H), slice(0, W // 2)
    places = torch.arange(H * W).view(H, W)[r, c].reshape(1, -1)
    got = tuned.model.through(slice(-1), rope, grid[:, r, c], places)

    inside = torch.zeros(H * W, dtype=torch.bool)
    inside[places[0]] = True
    prefix = own.num_prefix_tokens
    alone = F.pad(inside[:, None] == inside, (prefix, 0, prefix, 0)) | torch.eye(prefix + H * W, dtype=torch.bool)
    tokens = F.pad(grid.flatten(1, 2), (0, 0, prefix, 0))
    rotated = {} if rope is None else {"rope": rope if rope.dim() == 2 else rope[0]}
    want = own.blocks[0](tokens, attn_mask=alone, **rotated)[:, prefix:]
    torch.testing.assert_close(got.flatten(1, 2), want[:, places[0]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in VITS if "rotary" in kind])
def test_on_rotary_encoders_the_place_of_a_region_counts(kind: str) -> None:
    tuned = apply(VITS[kind](), "savit")
    x, rope = tuned.model.embed(pictures(tuned.model.encoder))
    region, right = x[:, :2, :2], torch.tensor([[0, 1, 4, 5]])
    before = tuned.model.through(slice(-1), rope, region, right)
    assert (tuned.model.through(slice(-1), rope, region, right[:, [0, 2, 1, 3]]) - before).abs().max() > 1e-4


def test_class_and_register_tokens_do_not_matter() -> None:
    tuned = apply(VITS["registers, LayerScale"](), "savit")
    x = pictures(tuned.model.encoder)
    before = tuned(x)
    with torch.no_grad():
        tuned.model.encoder.cls_token.add_(5)
        tuned.model.encoder.reg_token.add_(5)
    assert torch.equal(tuned(x), before)


def test_early_regions_reach_late_ones_and_never_the_other_way_round() -> None:
    tuned = apply(small(), "savit")
    x = pictures(tuned.model.encoder)
    before = tuned.forward_features(x).view(2, 4, 4, 48)
    for rows, columns, changed in ((slice(0, 32), slice(0, 32), 4), (slice(32, 64), slice(0, 32), 2)):
        other = x.clone()
        other[:, :, rows, columns] += 1
        apart = (tuned.forward_features(other).view(2, 4, 4, 48) - before).abs().amax((0, 3))
        assert [bool(part.max() > 1e-4) for half in apart.split(2) for part in half.split(2, 1)] == (
            [False] * (4 - changed) + [True] * changed
        )


@pytest.mark.parametrize(
    ("vit", "options", "message"),
    [
        (lambda: small("vit_base_patch16_plus_clip_240", depth=1), {}, "needs two blocks"),
        (lambda: small(patch_drop_rate=0.5), {}, "drops patches in training"),
        (lambda: small(image=(64, 32)), {"regions": 3}, "4 x 2 tokens cannot be cut into 3 x 3"),
        (lambda: swin(depths=(1, 1)), {}, "two blocks in the last stage"),
        (lambda: swin(dynamic_img_size=True), {}, "strict_img_size"),
        (lambda: small("vit_base_patch16_224", block_fn=_scaling()), {}, "make attention and FFN in one step"),
        (lambda: small(), {"regions": 1}, "regions"),
    ],
)
def test_what_cannot_be_is_refused(vit: Callable[[], Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        apply(vit(), "savit", **options)


def _scaling() -> Any:
    from timm.models.vision_transformer import ParallelScalingBlock

    return ParallelScalingBlock


# ---------------------------------------------------------------------------------------------- Swin


def swin_block_by_hand(block: Any, x: Tensor, table_window: int) -> Tensor:
    """A block over (B, h, w, D) without windows: every pair of tokens has the bias of how far apart they lie."""
    B, h, w, D = x.shape
    attention, heads = block.attn, block.attn.num_heads
    normed = F.layer_norm(x, (D,), block.norm1.weight, block.norm1.bias, block.norm1.eps).view(B, h * w, D)
    weight = merged_weight(attention.qkv) if hasattr(attention.qkv, "lora") else attention.qkv.weight
    q, k, v = (normed @ weight.T + attention.qkv.bias).chunk(3, -1)
    out = []
    for head in range(heads):
        part = slice(head * D // heads, (head + 1) * D // heads)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / (D // heads) ** 0.5
        for i in range(h * w):
            for j in range(h * w):
                down, right = i // w - j // w + table_window - 1, i % w - j % w + table_window - 1
                row = down * (2 * table_window - 1) + right
                scores[:, i, j] += attention.relative_position_bias_table[row, head]
        out.append(scores.softmax(-1) @ v[..., part])
    mix = torch.cat(out, -1) @ attention.proj.weight.T + attention.proj.bias
    x = x + mix.view(x.shape)
    return x + block.mlp(block.norm2(x))


@torch.no_grad()
@pytest.mark.parametrize("learnt", [False, True])
def test_on_a_swin_it_is_the_forward_by_hand_with_regions_of_4_by_4_of_7_by_7(learnt: bool) -> None:
    encoder = swin(depths=(1, 3))
    own = copy.deepcopy(encoder)
    tuned = apply(encoder, "savit")
    x = torch.randn(2, 1, 56, 56)
    tokens = own.layers[1].downsample(own.layers[0](own.patch_embed(x)))
    if learnt:
        learn(tuned)
        tokens = tuned.model.embed(x)[0]
    last = encoder.layers[1].blocks

    def through(z: Tensor, _: Tensor) -> Tensor:
        return swin_block_by_hand(last[1], swin_block_by_hand(last[0], z, 7), 7)

    four = [slice(0, 4), slice(3, 7)]
    whole = in_regions(tokens, tuned.model.prior, through, four, four)
    torch.testing.assert_close(tuned.forward_features(x), whole.flatten(1, 2), rtol=1e-4, atol=1e-5)
    pooled = swin_block_by_hand(last[2], mixed(whole, (4, 4)), 7)
    features = encoder.norm(tuned.model.mixpool.norm(pooled).mean((1, 2)))
    torch.testing.assert_close(tuned(x), features, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("region", [(4, 4), (7, 3), (1, 5), (7, 7)])
def test_a_block_fitted_to_a_region_attends_to_all_of_it_and_to_nothing_else(region: tuple[int, int]) -> None:
    block = swin(depths=(1, 2)).layers[1].blocks[1]
    fit_window(block, region)
    x = torch.randn(2, *region, 24)
    torch.testing.assert_close(block(x), swin_block_by_hand(block, x, 7), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_regions_that_windows_tile_are_windowed_and_shifted_as_timm_does() -> None:
    encoder = swin(image=128, window=4)  # 16 x 16 tokens in the last stage: regions of 8 x 8, windows of 4 x 4
    own = swin(image=64, window=4)  # 8 x 8 tokens in the last stage
    own.load_state_dict(encoder.state_dict())
    model = SwinOverRegions(encoder, 2)
    x = torch.randn(2, 8, 8, 24)
    assert own.layers[1].blocks[1].shift_size == (2, 2)
    torch.testing.assert_close(model.through(slice(None), None, x, torch.zeros(1, 64)), own.layers[1].blocks(x))


def test_a_swin_that_is_not_square_counts_copies_checkpoints_and_learns() -> None:
    tuned = apply(swin(image=(56, 40)), "savit", rank=2)
    twin = copy.deepcopy(tuned)
    twin.model.set_grad_checkpointing()
    x = torch.randn(2, 1, 56, 40)
    assert tuned.trainable == tuned.expected
    assert tuned.forward_features(x).shape == (2, tuned.shape.prefix + tuned.shape.N, tuned.shape.D)
    for one in (tuned, twin):
        learn(one)
        one.train()
        torch.manual_seed(1)
        one(x).square().sum().backward()
    for (name, mine), other in zip(tuned.named_parameters(), twin.parameters(), strict=True):
        if mine.requires_grad:
            assert mine.grad is not None, name
            assert mine.grad.abs().max() > 0, name
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-6, msg=name)
        else:
            assert mine.grad is None, name


@pytest.mark.parametrize("make", [small, swin])
def test_bf16_stays_near_fp32(make: Callable[[], Any]) -> None:
    tuned = apply(make(), "savit")
    x = torch.randn(2, 1, *tuned.model.encoder.patch_embed.img_size)
    with torch.autocast("cpu", torch.bfloat16):
        low = tuned(x)
    assert (low.float() - tuned(x)).abs().max() < 0.1
    low.float().sum().backward()


def test_what_learnt_on_a_swin_is_written_and_read_back(tmp_path: Any) -> None:
    tuned, again = apply(swin(), "savit"), apply(swin(), "savit")
    learn(tuned)
    x = torch.randn(2, 1, 56, 56)
    tuned.method.write(tuned.model, tuned.method.contents(tuned.model), tmp_path)
    again.method.read(again.model, tmp_path)
    assert torch.equal(tuned(x), again(x))
