"""The model against MAE written out by hand, and what must hold for any number of scales."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from miram.engine.errors import UserError
from miram.pretrain.attention import build_attention
from miram.pretrain.build import build_miram
from miram.pretrain.config import ModelSection, ScaleSection
from miram.pretrain.decoder import Decoder, UpsampleTokens, divide
from miram.pretrain.encoder import build_encoder, card_for, encode_visible, sincos_positions
from miram.pretrain.masking import random_masking, upsample_mask
from miram.pretrain.miram import Miram
from miram.pretrain.patches import normalise_patches, patchify, unpatchify

SIZE, P = (32, 48), 16
NARROW = {"depth": 1, "width": 16, "heads": 2}


def scale(s: int, **options: object) -> ScaleSection:
    return ScaleSection(**{"scale": s, **NARROW, **options})  # type: ignore[arg-type]


def model(*scales: ScaleSection, size: tuple[int, int] = SIZE, **options: object) -> Miram:
    torch.manual_seed(0)
    card = card_for("vit_tiny_patch16_224", size, {"depth": 2, "embed_dim": 32, "num_heads": 2})
    return Miram(build_encoder(card), scales, **options)  # type: ignore[arg-type]


def batch_for(net: Miram, n: int = 4) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {name: torch.rand(n, *shape, generator=draw) for name, shape in net.inputs.items()}


def batch(scales: tuple[int, ...] = (1, 2), n: int = 4) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    views = {f"view/{s}": torch.randn(n, 1, s * SIZE[0], s * SIZE[1], generator=draw) for s in scales}
    return views | {"noise": torch.rand(n, 6, generator=draw)}


# ---------------------------------------------------------------------------------------------- masking


@pytest.mark.parametrize(
    ("patches", "ratio", "visible"), [(196, 0.75, 49), (196, 0.9, 19), (49, 0.75, 12), (64, 0.5, 32)]
)
def test_as_many_patches_stay_visible_as_in_mae(patches: int, ratio: float, visible: int) -> None:
    ids_keep, mask = random_masking(torch.rand(3, patches), ratio)
    assert ids_keep.shape == (3, visible)
    assert (~mask).sum(1).tolist() == [visible] * 3


def test_visible_patches_are_those_of_least_noise_sample_by_sample() -> None:
    noise = torch.rand(5, 40)
    ids_keep, mask = random_masking(noise, 0.7)
    for row in range(5):
        least = set(np.argsort(noise[row].numpy())[: int(40 * (1 - 0.7))].tolist())
        assert set(ids_keep[row].tolist()) == least == set(torch.nonzero(~mask[row]).flatten().tolist())


def test_fine_mask_covers_the_same_place() -> None:
    mask = torch.rand(2, 6) < 0.5
    fine = upsample_mask(mask, (2, 3), 4).reshape(2, 8, 12)
    for i in range(8):
        for j in range(12):
            assert torch.equal(fine[:, i, j], mask.reshape(2, 2, 3)[:, i // 4, j // 4])


# ---------------------------------------------------------------------------------------------- patches


def test_patches_are_in_raster_order_and_come_back() -> None:
    images = torch.randn(2, 3, *SIZE)
    patches = patchify(images, P)
    assert torch.equal(patches[1, 4], images[1, :, 16:32, 16:32].permute(1, 2, 0).flatten())
    assert torch.equal(unpatchify(patches, P, (2, 3)), images)


def test_normalised_patches_have_unit_variance_and_noise_stays_small() -> None:
    loud = torch.randn(1, 2, 256) * 5 + 3
    normal = normalise_patches(loud, 0.01)
    torch.testing.assert_close(normal.mean(-1), torch.zeros(1, 2), atol=1e-5, rtol=0)
    torch.testing.assert_close(normal.var(-1), torch.ones(1, 2), atol=1e-2, rtol=0)
    noise = normalise_patches(torch.randn(1, 1, 256) * 1e-3, 0.01)
    assert noise.std() < 0.02


# ---------------------------------------------------------------------------------------------- decoder


@pytest.mark.parametrize("s", [2, 3])
@pytest.mark.parametrize("mode", ["nearest", "learned"])
def test_fine_token_comes_from_the_coarse_one_above_it(s: int, mode: str) -> None:
    """`learned` starts as `nearest`."""
    tokens = torch.randn(2, 1 + 6, 8)
    fine = UpsampleTokens(8, (2, 3), s, 1, mode)(tokens)
    assert torch.equal(fine[:, 0], tokens[:, 0])
    grid = fine[:, 1:].reshape(2, 2 * s, 3 * s, 8)
    for i in range(2):
        for j in range(3):
            for a in range(s):
                for b in range(s):
                    assert torch.equal(grid[:, s * i + a, s * j + b], tokens[:, 1 + 3 * i + j])


def test_bilinear_upsampling_keeps_a_plane_a_plane() -> None:
    """Inside the border, bilinear interpolation of a linear ramp is that ramp."""
    ramp = torch.arange(5.0)[None, :, None].expand(4, 5, 2).reshape(1, 20, 2)
    fine = UpsampleTokens(2, (4, 5), 2, 0, "bilinear")(ramp).reshape(8, 10, 2)[3, 1:-1, 0]
    torch.testing.assert_close(fine, torch.arange(8) / 2 + 0.25)


def test_positions_are_mae_s_sines_and_cosines() -> None:
    """By hand, in the order of MAE's weights: a quarter each sine and cosine of the column, then of the row."""
    positions = sincos_positions((3, 5), 16)[0].reshape(3, 5, 16).numpy()
    omega = 1 / 10000 ** (np.arange(4) / 4)
    for i in range(3):
        for j in range(5):
            by_hand = [np.sin(j * omega), np.cos(j * omega), np.sin(i * omega), np.cos(i * omega)]
            np.testing.assert_allclose(positions[i, j], np.concatenate(by_hand), atol=1e-6)


def test_learned_upsampling_has_a_matrix_for_each_place() -> None:
    """Place (1, 0) negated: only the fine tokens below and left of each coarse one's corner change."""
    upsample, tokens = UpsampleTokens(8, (2, 3), 2, 1, "learned"), torch.randn(2, 1 + 6, 8)
    with torch.no_grad():
        upsample.places.weight[:, :, 1, 0] *= -1
    fine = upsample(tokens)[:, 1:].reshape(2, 4, 6, 8)
    coarse = tokens[:, 1:].reshape(2, 2, 3, 8)
    torch.testing.assert_close(fine[:, 1::2, 0::2], -coarse)
    for a, b in ((0, 0), (0, 1), (1, 1)):
        torch.testing.assert_close(fine[:, a::2, b::2], coarse)


def test_fine_tokens_have_the_positions_of_their_own_grid() -> None:
    """Row and column of the 4 x 6 grid, written out: MAE has those of the column first; the prefix has none."""
    decoder = Decoder(scale(2), 16, (2, 3), 1, 256)
    assert not decoder.pos_embed[:, :1].any()
    positions, omega = decoder.pos_embed[0, 1:].reshape(4, 6, 16), 1 / 10000 ** (torch.arange(4) / 4)
    for i in range(4):
        for j in range(6):
            by_hand = [torch.sin(j * omega), torch.cos(j * omega), torch.sin(i * omega), torch.cos(i * omega)]
            torch.testing.assert_close(positions[i, j], torch.cat(by_hand))


def test_decoder_gives_one_token_a_fine_patch() -> None:
    decoder = Decoder(scale(3, attention="nystrom", options={"num_landmarks": 4}), 24, (2, 3), 1, 256)
    x = decoder(torch.randn(2, 7, 24))
    assert x.shape == (2, 54, 16)
    assert decoder.head(x).shape == (2, 54, 256)


def test_every_other_block_shifts_its_windows() -> None:
    decoder = Decoder(scale(2, attention="window", depth=3, options={"window": 4}), 16, (4, 6), 1, 256)
    even = build_attention("window", 16, 2, (8, 12), 1, window=4)
    odd = build_attention("window", 16, 2, (8, 12), 1, window=4, shift=True)
    x = torch.randn(1, 97, 16)
    for block, alike in zip(decoder.blocks, (even, odd, even), strict=True):
        alike.load_state_dict(block.attn.state_dict())
        torch.testing.assert_close(block.attn(x), alike(x))
    assert not torch.allclose(odd(x), even(x))


@pytest.mark.parametrize(
    ("grid", "fraction", "expected"),
    [((14, 14), 0.25, (2, 1)), ((14, 14), 0.5, (2, 2)), ((8, 4), 0.0625, (4, 1)), ((6, 4), 1.0, (1, 1))],
)
def test_as_few_tiles_as_make_up_the_fraction(
    grid: tuple[int, int], fraction: float, expected: tuple[int, int]
) -> None:
    assert divide(grid, fraction) == expected


@pytest.mark.parametrize("grid", [(14, 14), (7, 5)])
def test_a_fraction_that_no_tiles_make_up_is_refused(grid: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"decode_fraction 0\.3"):
        divide(grid, 0.3)


def tiled(fraction: float, s: int = 2, **options: object) -> Decoder:
    torch.manual_seed(3)
    return Decoder(scale(s, decode_fraction=fraction, **options), 16, (4, 6), 1, 256)


def test_chosen_tiles_are_decoded_as_if_alone() -> None:
    """Each tile by hand: the prefix and the tile's own upsampled tokens with their positions in the whole grid."""
    decoder, tokens = tiled(0.5), torch.randn(2, 25, 16)
    chosen = torch.tensor([[3, 0], [1, 2]])
    found = decoder(tokens, chosen).reshape(2, 2, 4 * 6, 16)
    whole = decoder.upsample(tokens) + decoder.pos_embed
    grid = whole[:, 1:].reshape(2, 8, 12, 16)
    for b in range(2):
        for k in range(2):
            row, column = divmod(int(chosen[b, k]), 2)
            tile = grid[b, 4 * row : 4 * row + 4, 6 * column : 6 * column + 6].reshape(1, 24, 16)
            alone = decoder.norm(decoder.blocks(torch.cat([whole[b : b + 1, :1], tile], 1)))[0, 1:]
            torch.testing.assert_close(found[b, k], alone)


def test_all_tiles_come_back_in_raster_order() -> None:
    decoder, tokens = tiled(0.25), torch.randn(2, 25, 16)
    everything = decoder(tokens).reshape(2, 8, 12, 16)
    last = decoder(tokens, torch.tensor([[3], [3]])).reshape(2, 4, 6, 16)
    torch.testing.assert_close(everything[:, 4:, 6:], last)


def test_recomputed_blocks_give_the_same_gradients() -> None:
    kept, recomputed = tiled(0.5), tiled(0.5, checkpointing=True)
    tokens, chosen = torch.randn(2, 25, 16), torch.tensor([[3, 0], [1, 2]])
    for decoder in (kept, recomputed):
        decoder(tokens.clone().requires_grad_(), chosen).square().sum().backward()
    for a, b in zip(kept.parameters(), recomputed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


# ---------------------------------------------------------------------------------------------- visible patches


def test_encoding_all_patches_is_the_vit_itself() -> None:
    vit = model(scale(1)).encoder
    images = torch.randn(2, 1, *SIZE)
    everything = torch.arange(6).expand(2, 6)
    torch.testing.assert_close(encode_visible(vit, images, everything), vit.forward_features(images))


def test_hidden_pixels_never_reach_the_encoder() -> None:
    vit, images = model(scale(1)).encoder, torch.randn(1, 1, *SIZE)
    changed = images.clone()
    changed[..., :16, :16] += 100  # patch 0
    keep = torch.tensor([[1, 4, 5]])
    assert torch.equal(encode_visible(vit, images, keep), encode_visible(vit, changed, keep))


# ---------------------------------------------------------------------------------------------- the whole


def test_one_scale_is_mae_written_out() -> None:
    """Encoder on visible patches, mask tokens in the gaps, positions, blocks, error of normalised masked patches."""
    mae, data = model(scale(1), variance_floor=0.0), batch()
    images, (ids_keep, mask) = data["view/1"], random_masking(data["noise"], 0.75)
    latent = mae.decoder_embed(encode_visible(mae.encoder, images, ids_keep))
    full = mae.mask_token.expand(4, 6, -1).clone()
    for b in range(4):
        for k, place in enumerate(ids_keep[b]):
            full[b, place] = latent[b, 1 + k]
    decoder = mae.decoders["1"]
    x = torch.cat([latent[:, :1], full + sincos_positions((2, 3), 16)], 1)
    predicted = decoder.head(decoder.norm(decoder.blocks(x)))[:, 1:]
    patches = images.reshape(4, 2, 16, 3, 16).permute(0, 1, 3, 2, 4).reshape(4, 6, 256)
    target = (patches - patches.mean(-1, keepdim=True)) / patches.var(-1, keepdim=True).sqrt()
    loss = (((predicted - target) ** 2).mean(-1) * mask).sum() / mask.sum()
    torch.testing.assert_close(mae(data)[0] / mae.counts(data)[0], loss)


SHARED = ScaleSection(scale=2, tokens="shared")
VARIED = [
    ((scale(1), SHARED), {}),
    ((scale(1), SHARED, scale(4, upsample="learned")), {"target": "upsampled"}),
    ((scale(1, decode_fraction=0.5), SHARED), {"tissue_loss": 1.0}),
    ((scale(1), scale(2, decode_fraction=0.25, width=8, checkpointing=True)), {"tissue_loss": 0.5, "mask_unit": 2}),
]


@pytest.mark.parametrize(("scales", "options"), VARIED)
def test_every_way_to_decode_learns_without_dead_parameters(
    scales: tuple[ScaleSection, ...], options: dict[str, object]
) -> None:
    net = model(*scales, size=(64, 64), **options)
    data = batch_for(net)
    losses, counts = net(data), net.counts(data)
    assert losses.shape == counts.shape == (len(scales),)
    assert (losses / counts > 0).all()
    losses.sum().backward()
    dead = [name for name, p in net.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert dead == []


def test_a_shared_head_predicts_larger_patches_from_the_coarse_tokens() -> None:
    """Of an image of 64 x 96 the first prediction is that of its first 32 x 32 pixels."""
    net = model(scale(1), SHARED, norm_pix=False)
    data = batch_for(net)
    ids_keep, mask = net.masks(data)
    latent = net.fill(net.decoder_embed(encode_visible(net.encoder, data["view/1"], ids_keep)), ids_keep)
    predicted = net.wide_heads["2"](net.decoders["1"](latent))
    target = torch.stack(
        [data["view/2"][:, 0, 32 * i : 32 * i + 32, 32 * j : 32 * j + 32] for i in range(2) for j in range(3)], 1
    )
    by_hand = ((predicted - target.flatten(2)) ** 2).mean(-1)[mask].sum()
    torch.testing.assert_close(net(data)[1], by_hand)


def test_the_loss_of_chosen_tiles_is_that_part_of_the_whole_loss() -> None:
    """Tiles are drawn by their noise; all of them together make up the sum over all tiles, decoded at once."""
    torch.manual_seed(0)
    net = model(scale(1), scale(2, decode_fraction=0.25), size=(64, 64))
    data = batch_for(net)
    ids_keep, mask = net.masks(data)
    errors = (net.reconstruct(data["view/1"], ids_keep)[1] - net.patches(net.scales[1], data["view/2"])) ** 2
    whole = errors.mean(-1).mul(net.fine_mask(net.scales[1], mask)).sum()
    parts = [net(data | {"tiles/2": (torch.arange(4) != t).float().expand(4, 4)})[1] for t in range(4)]
    torch.testing.assert_close(sum(parts), whole)
    assert net.counts(data)[1] < mask.sum() * 4


@pytest.mark.parametrize("section", [scale(2), scale(4), SHARED])
def test_a_predicted_patch_shows_the_tissue_of_the_patch_above_it(section: ScaleSection) -> None:
    """The mean grey level of all predicted patches above a patch of the encoder is that patch's own."""
    net = model(scale(1), section, norm_pix=False)
    fine = torch.rand(2, 1, section.scale * SIZE[0], section.scale * SIZE[1])
    coarse = patchify(F.avg_pool2d(fine, section.scale), P).mean(-1)
    rows, columns = net.grid_of(section)
    levels = net.patches(section, fine).mean(-1).reshape(2, 2, rows // 2, 3, columns // 3).mean((2, 4))
    torch.testing.assert_close(levels.flatten(1), coarse)


def test_units_of_the_mask_are_hidden_whole() -> None:
    net = model(scale(1), size=(64, 96), mask_unit=2)
    ids_keep, mask = net.masks(batch_for(net, n=6))
    squares = mask.reshape(6, 2, 2, 3, 2).transpose(2, 3).flatten(3)
    assert torch.equal(squares.any(-1), squares.all(-1))
    assert ids_keep.shape == (6, 4)
    for row in range(6):
        assert set(ids_keep[row].tolist()) == set(torch.nonzero(~mask[row]).flatten().tolist())


def test_tissue_weighs_the_patches() -> None:
    """Fully weighted, a patch of air adds nothing and a half counts half; at 0.5 air counts half."""
    full, half = (model(scale(1), tissue_loss=w, norm_pix=False) for w in (1.0, 0.5))
    data = batch_for(full)
    plain = model(scale(1), norm_pix=False)
    data["tissue/1"] = torch.tensor([1.0, 0.0, 0.5, 1.0, 0.0, 1.0]).expand(4, 6)
    _, mask = plain.masks(data)
    torch.testing.assert_close(full.counts(data)[0], (mask * data["tissue/1"]).sum())
    torch.testing.assert_close(half.counts(data)[0], (mask * (0.5 + data["tissue/1"] / 2)).sum())
    torch.testing.assert_close(half(data), (full(data) + plain(data)) / 2)


def test_the_upsampled_target_holds_nothing_that_the_encoder_was_not_given() -> None:
    net = model(scale(1), scale(2), target="upsampled")
    assert set(net.inputs) == {"noise", "view/1"}
    data = batch_for(net)
    target = net.target_image(net.scales[1], data)
    assert torch.equal(target, data["view/1"].repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_impossible_combinations_are_refused() -> None:
    with pytest.raises(ValueError, match="mask_unit 2"):
        model(scale(1), mask_unit=2, size=(48, 48))
    with pytest.raises(ValueError, match="needs a decoder of scale 1"):
        model(scale(2), ScaleSection(scale=4, tokens="shared"))
    with pytest.raises(ValidationError, match="every weight is 0"):
        ModelSection(scales=(scale(1, weight=0.0), scale(2, weight=0.0)))
    with pytest.raises(ValidationError, match="needs a decoder of scale 1"):
        ModelSection(scales=(scale(2), ScaleSection(scale=4, tokens="shared")))
    with pytest.raises(ValidationError, match="leave out depth"):
        ScaleSection(scale=2, tokens="shared", depth=3)
    with pytest.raises(ValidationError, match="valid integer"):
        ScaleSection(scale=1.5)


@pytest.mark.parametrize("scales", [(1,), (2,), (1, 2), (1, 2, 4), (3, 1)])
def test_any_scales_learn_and_every_parameter_gets_a_gradient(scales: tuple[int, ...]) -> None:
    net = model(*(scale(s, attention="nystrom" if s > 1 else "softmax", options={}) for s in scales))
    losses = net(batch((1, *scales)))
    assert losses.shape == (len(scales),)
    losses.sum().backward()
    dead = [name for name, p in net.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert dead == []


def test_widths_may_differ_between_scales() -> None:
    net = model(scale(1), scale(2, width=8))
    assert net(batch()).isfinite().all()


def test_counts_are_the_patches_that_count() -> None:
    net, data = model(scale(1), scale(2, loss_on="all"), scale(4)), batch((1, 2, 4))
    assert net.counts(data).tolist() == [4 * 5, 4 * 6 * 4, 4 * 5 * 16]


def test_loss_on_masked_ignores_what_was_visible() -> None:
    net, data = model(scale(2), norm_pix=False), batch()
    _, mask = random_masking(data["noise"], 0.75)
    visible = ~upsample_mask(mask, (2, 3), 2)
    patches = patchify(data["view/2"], P)
    patches[visible] += 9
    changed = data | {"view/2": unpatchify(patches, P, (4, 6))}
    assert torch.equal(net(changed), net(data))


def test_loss_of_a_batch_is_the_sum_over_its_samples() -> None:
    net, data = model(scale(1), scale(2, attention="nystrom", options={"num_landmarks": 4})), batch()
    alone = sum(net({k: v[i : i + 1] for k, v in data.items()}) for i in range(4))
    torch.testing.assert_close(net(data), alone)


def test_xformers_is_refused_where_no_decoder_would_use_it() -> None:
    """`tokens: shared` has no attention, whatever the default of that key says."""
    section = ModelSection(scales=(scale(1, attention="nystrom"), SHARED), attention_backend="xformers")
    with pytest.raises(UserError, match="no softmax decoder"):
        build_miram(section, model(scale(1)).encoder)
