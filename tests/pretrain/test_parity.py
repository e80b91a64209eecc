"""Parity with transformers' ViT-MAE: the same weights, mask and image give the same loss and the same gradients."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from transformers import ViTMAEConfig, ViTMAEForPreTraining
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEDecoder, ViTMAEEmbeddings

from miram.pretrain.config import ScaleSection
from miram.pretrain.encoder import build_encoder, card_for, sincos_positions
from miram.pretrain.miram import Miram
from miram.pretrain.weights.layouts import miram_state, translate


def hf_positions(config: ViTMAEConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """The positions that transformers gives encoder and decoder; in a model made at random they are zero."""
    embeddings = ViTMAEEmbeddings(config)
    embeddings.initialize_weights()
    decoder = ViTMAEDecoder(config, num_patches=16)
    decoder.initialize_weights(num_patches=16)
    return embeddings.position_embeddings.data, decoder.decoder_pos_embed.data


def pair(norm_pix: bool) -> tuple[ViTMAEForPreTraining, Miram]:
    """Random weights in transformers' model, and the same in ours."""
    torch.manual_seed(0)
    config = ViTMAEConfig(
        image_size=32,
        patch_size=8,
        num_channels=1,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=192,
        decoder_hidden_size=32,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=128,
        layer_norm_eps=1e-6,
        norm_pix_loss=norm_pix,
        mask_ratio=0.75,
    )
    theirs = ViTMAEForPreTraining(config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter) * parameter.requires_grad)
        places = theirs.vit.embeddings.position_embeddings, theirs.decoder.decoder_pos_embed
        for place, positions in zip(places, hf_positions(config), strict=True):
            place.copy_(positions)
    card = card_for("vit_tiny_patch16_224", (32, 32), {"patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4})
    scale = ScaleSection(scale=1, depth=2, width=32, heads=4)
    ours = Miram(build_encoder(card), [scale], mask_ratio=0.75, norm_pix=norm_pix, variance_floor=1e-6)
    ours.load_state_dict(miram_state(translate(theirs.state_dict())), strict=True)
    return theirs, ours


@pytest.mark.parametrize("norm_pix", [True, False])
def test_loss_and_every_gradient_are_those_of_transformers(norm_pix: bool) -> None:
    theirs, ours = pair(norm_pix)
    images, noise = torch.randn(3, 1, 32, 32), torch.rand(3, 16)
    batch = {"view/1": images, "noise": noise}
    expected = theirs(images, noise=noise).loss
    loss = ours(batch)[0] / ours.counts(batch)[0]
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    expected.backward()
    loss.backward()
    gradients = {key: p.grad for key, p in theirs.named_parameters() if p.grad is not None}
    by_name = miram_state(translate(gradients))
    learnt = {key: cast(torch.Tensor, p.grad) for key, p in ours.named_parameters() if p.requires_grad}
    assert learnt.keys() == by_name.keys()
    for key, gradient in learnt.items():
        largest = by_name[key].abs().max()
        assert largest > 1e-3, f"{key}: too small to tell anything"
        difference = (gradient - by_name[key]).abs().max()
        assert difference < 1e-5, f"{key}: {difference}"
        assert difference < 1e-5 * largest.clamp(min=0.1), f"{key}: {difference} of {largest}"


def test_positions_are_transformers_own() -> None:
    """Which are those of the released weights, with nothing for the class token."""
    theirs, ours = pair(norm_pix=True)
    for built, width in ((theirs.vit.embeddings.position_embeddings, 48), (theirs.decoder.decoder_pos_embed, 32)):
        assert built[:, 1:].std() > 0.3
        assert not built[:, 0].any()
        torch.testing.assert_close(sincos_positions((4, 4), width), built[:, 1:].detach())
    torch.testing.assert_close(ours.decoders["1"].pos_embed, theirs.decoder.decoder_pos_embed.detach())
