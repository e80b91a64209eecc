"""The model against MAE written out by hand, and what must hold for any number of scales."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from miram.pretrain.config import ScaleSection
from miram.pretrain.decoder import Decoder, upsample_tokens
from miram.pretrain.encoder import build_encoder, card_for, encode_visible, sincos_positions
from miram.pretrain.masking import random_masking, upsample_mask
from miram.pretrain.miram import Miram
from miram.pretrain.patches import normalise_patches, patchify, unpatchify

SIZE, P = (32, 48), 16
NARROW = {"depth": 1, "width": 16, "heads": 2}


def scale(s: int, **options: object) -> ScaleSection:
    return ScaleSection(**{"scale": s, **NARROW, **options})  # type: ignore[arg-type]


def model(*scales: ScaleSection, **options: object) -> Miram:
    torch.manual_seed(0)
    card = card_for("vit_tiny_patch16_224", SIZE, {"depth": 2, "embed_dim": 32, "num_heads": 2})
    return Miram(build_encoder(card), scales, **options)  # type: ignore[arg-type]


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
def test_fine_token_comes_from_the_coarse_one_above_it(s: int) -> None:
    tokens = torch.randn(2, 1 + 6, 8)
    fine = upsample_tokens(tokens, (2, 3), s, 1, "nearest")
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
    fine = upsample_tokens(ramp, (4, 5), 2, 0, "bilinear").reshape(8, 10, 2)[3, 1:-1, 0]
    torch.testing.assert_close(fine, torch.arange(8) / 2 + 0.25)


def test_positions_are_mae_s_sines_and_cosines() -> None:
    """As in MAE's appendix but for the order of channels: a quarter each for sine and cosine of row and column."""
    positions = sincos_positions((3, 5), 16)[0].reshape(3, 5, 2, 2, 4)
    omega = 1 / 10000 ** (torch.arange(4) / 4)
    for i in range(3):
        for j in range(5):
            by_hand = [[torch.sin(i * omega), torch.sin(j * omega)], [torch.cos(i * omega), torch.cos(j * omega)]]
            torch.testing.assert_close(positions[i, j], torch.stack([torch.stack(axes) for axes in by_hand]))


def test_decoder_predicts_one_patch_a_fine_token() -> None:
    decoder = Decoder(scale(3, attention="nystrom", options={"num_landmarks": 4}), 24, (2, 3), 1, 256)
    assert decoder(torch.randn(2, 7, 24)).shape == (2, 54, 256)


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
    decoder = mae.decoders[0]
    x = torch.cat([latent[:, :1], full + sincos_positions((2, 3), 16)], 1)
    predicted = decoder.head(decoder.norm(decoder.blocks(x)))[:, 1:]
    patches = images.reshape(4, 2, 16, 3, 16).permute(0, 1, 3, 2, 4).reshape(4, 6, 256)
    target = (patches - patches.mean(-1, keepdim=True)) / patches.var(-1, keepdim=True).sqrt()
    loss = (((predicted - target) ** 2).mean(-1) * mask).sum() / mask.sum()
    torch.testing.assert_close(mae(data)[0] / mae.counts(data)[0], loss)


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
