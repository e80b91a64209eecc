"""MIRAM: a masked autoencoder that reconstructs an image at several scales (Vo et al. 2025, arXiv 2503.07157).

The encoder sees the visible patches of the image. Its tokens, with a mask token in every gap, make one full grid that
all decoders share; the decoder of scale s works on a grid s times as fine and reconstructs the image s times as fine,
so that scale 2 must invent detail the encoder never saw. After pretraining the decoders are dropped. One scale is MAE
(He et al. 2022, arXiv 2111.06377).

Legend: B batch, C channels, n patches of the grid, V visible ones, D width of the shared grid, p patch side.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..engine.loop import Batch, Objective
from .config import ScaleSection
from .decoder import Decoder
from .encoder import encode_visible, initialise
from .masking import random_masking, upsample_mask
from .patches import normalise_patches, patchify


class Miram(Objective):
    """Encoder and one decoder a scale.

    Args:
        encoder: a ViT; its input is the image at scale 1.
        scales: the decoders; the first one's width is that of the shared grid.
        mask_ratio: part of the patches hidden from the encoder.
        norm_pix: predict pixels normalised patch by patch.
        variance_floor: see `patches.patch_moments`.
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        scales: Sequence[ScaleSection],
        mask_ratio: float = 0.75,
        norm_pix: bool = True,
        variance_floor: float = 0.01,
    ):
        super().__init__()
        self.scales, self.mask_ratio, self.norm_pix, self.variance_floor = (
            tuple(scales),
            mask_ratio,
            norm_pix,
            variance_floor,
        )
        self.loss_names = tuple(str(section.scale) for section in scales)
        self.loss_weights = tuple(section.weight for section in scales)
        self.p, self.grid, self.prefix_tokens = (
            encoder.patch_embed.patch_size[0],
            encoder.patch_embed.grid_size,
            encoder.num_prefix_tokens,
        )
        width, out_dim = scales[0].width, self.p**2 * encoder.patch_embed.proj.in_channels
        self.decoder_embed = nn.Linear(encoder.embed_dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoders = nn.ModuleList(
            Decoder(section, width, self.grid, self.prefix_tokens, out_dim) for section in scales
        )
        initialise(self)
        nn.init.normal_(self.mask_token, std=0.02)
        self.encoder = encoder  # after `initialise`: its weights may come from elsewhere

    def forward(self, batch: Batch) -> Tensor:
        """`view/<s>` (B, C, s*H, s*W) and `noise` (B, n) -> (S,) sums of patch errors."""
        ids_keep, mask = random_masking(batch["noise"], self.mask_ratio)
        predictions = self.reconstruct(batch["view/1"], ids_keep)
        return torch.stack([self.error(s, y, batch, mask) for s, y in zip(self.scales, predictions, strict=True)])

    def reconstruct(self, images: Tensor, ids_keep: Tensor) -> list[Tensor]:
        """(B, C, H, W) and (B, V) -> for every scale (B, s*s*n, p*p*C) predicted patches."""
        latent = self.decoder_embed(encode_visible(self.encoder, images, ids_keep))
        tokens = self.fill(latent, ids_keep)
        return [decoder(tokens) for decoder in self.decoders]

    def fill(self, latent: Tensor, ids_keep: Tensor) -> Tensor:
        """(B, prefix + V, D) -> (B, prefix + n, D): visible tokens at their places, mask tokens at the others."""
        B, _, D = latent.shape
        prefix, visible = latent[:, : self.prefix_tokens], latent[:, self.prefix_tokens :]
        grid = self.mask_token.to(latent.dtype).expand(B, self.grid[0] * self.grid[1], D)
        return torch.cat([prefix, grid.scatter(1, ids_keep[..., None].expand(-1, -1, D), visible)], dim=1)

    def error(self, section: ScaleSection, prediction: Tensor, batch: Batch, mask: Tensor) -> Tensor:
        """Sum over counted patches of the mean squared error of a patch, in fp32."""
        target = self.target(batch[f"view/{section.scale}"])
        patch_errors = (prediction.float() - target).square().mean(-1)
        return (patch_errors * self.counted(section, mask)).sum()

    def target(self, images: Tensor) -> Tensor:
        """(B, C, s*H, s*W) -> (B, s*s*n, p*p*C) what the decoder of that scale is to predict."""
        patches = patchify(images, self.p)
        return normalise_patches(patches, self.variance_floor) if self.norm_pix else patches

    def counted(self, section: ScaleSection, mask: Tensor) -> Tensor:
        """(B, s*s*n) which patches of the scale enter its loss."""
        fine = upsample_mask(mask, self.grid, section.scale)
        return fine if section.loss_on == "masked" else torch.ones_like(fine)

    def counts(self, batch: Batch) -> Tensor:
        """(S,) patches that enter each loss."""
        _, mask = random_masking(batch["noise"], self.mask_ratio)
        return torch.stack([self.counted(section, mask).sum().float() for section in self.scales])
