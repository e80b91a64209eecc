"""MIRAM: a masked autoencoder that reconstructs an image at several scales (Vo et al. 2025, arXiv 2503.07157).

The encoder sees the visible patches of the image. Its tokens, with a mask token in every gap, make one full grid that
all decoders share; the decoder of scale s works on a grid s times as fine and reconstructs the image s times as fine,
so that scale 2 must invent detail the encoder never saw. After pretraining the decoders are dropped. One scale is MAE
(He et al. 2022, arXiv 2111.06377).

Legend: B batch, C channels, n patches of the grid, V visible ones, D width of the shared grid, p patch side; of a
scale s: N predicted patches of P x P pixels, of which K are decoded in a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..engine.objective import Batch, Objective
from .attention import Attention, Grid
from .config import ScaleSection
from .decoder import Decoder
from .encoder import Encoder, encode_visible, initialise
from .layers import distances
from .masking import gather_cells, random_masking, tile_ids, upsample_mask
from .patches import normalise_patches, patchify


class Miram(Objective):
    """Encoder and one decoder a scale.

    Args:
        encoder: a ViT; its input is the image at scale 1.
        scales: the decoders; the width of the first is that of the shared grid. With `tokens: shared` a scale has only
            a head, which predicts patches of (s*p) x (s*p) pixels from the tokens of scale 1: the cheap rival of a
            second decoder (as in MRM, Zhou et al. 2023).
        mask_ratio: part of the patches hidden from the encoder.
        mask_unit: side of the squares of patches that are hidden together (long-sequence MAE, Hu et al. 2022).
        norm_pix: predict pixels normalised patch by patch.
        variance_floor: see `patches.patch_moments`.
        tissue_loss: from 0, all patches count alike, to 1, each by its part that is breast.
        target: of finer scales: `source`, their own view, or `upsampled`, the encoder's input enlarged, which holds
            no more than the encoder was given (the released code's target).

    Raises:
        ValueError: the grid divides neither into the units of masking nor into the tiles that a scale decodes, or
            `tokens: shared` finds no decoder of scale 1.
    """

    def __init__(
        self,
        encoder: Encoder,
        scales: Sequence[ScaleSection],
        *,
        mask_ratio: float = 0.75,
        mask_unit: int = 1,
        norm_pix: bool = True,
        variance_floor: float = 0.01,
        tissue_loss: float = 0.0,
        target: Literal["source", "upsampled"] = "source",
    ):
        super().__init__()
        self.scales, self.mask_ratio, self.mask_unit = tuple(scales), mask_ratio, mask_unit
        self.norm_pix, self.variance_floor = norm_pix, variance_floor
        self.tissue_loss, self.target = tissue_loss, target
        self.loss_names = tuple(str(section.scale) for section in scales)
        self.loss_weights = tuple(section.weight for section in scales)
        self.p, self.grid = encoder.patch_embed.patch_size[0], encoder.patch_embed.grid_size
        self.channels, self.prefix_tokens = encoder.patch_embed.proj.in_channels, encoder.num_prefix_tokens
        if any(side % mask_unit for side in self.grid):
            raise ValueError(
                f"mask_unit {mask_unit} does not divide the grid of {self.grid[0]} x {self.grid[1]} patches"
            )
        self.register_buffer("units", tile_ids(self.grid, (mask_unit, mask_unit)), persistent=False)
        self.units: Tensor
        width = next(section.width for section in scales if section.tokens == "upsampled")
        self.decoder_embed = nn.Linear(encoder.embed_dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoders, self.wide_heads = nn.ModuleDict(), nn.ModuleDict()
        for i, section in enumerate(scales):
            with naming(f"scales.{i}"):
                self.add_scale(section, width)
        initialise(self)
        nn.init.normal_(self.mask_token, std=0.02)
        self.encoder = encoder  # after `initialise`: its weights may come from elsewhere

    def add_scale(self, section: ScaleSection, width: int) -> None:
        """A decoder, or a head on that of scale 1."""
        name, out_dim = str(section.scale), self.patch_of(section) ** 2 * self.channels
        if section.tokens == "upsampled":
            self.decoders[name] = Decoder(section, width, self.grid, self.prefix_tokens, out_dim)
            return
        coarse = [other.width for other in self.scales if other.scale == 1 and other.tokens == "upsampled"]
        if not coarse:
            raise ValueError("tokens: shared needs a decoder of scale 1 to share")
        self.wide_heads[name] = nn.Linear(coarse[0], out_dim)

    # ------------------------------------------------------------------------------------------ learning

    def forward(self, batch: Batch) -> Tensor:
        """A batch of `inputs` -> (S,) weighted sums of patch errors."""
        ids_keep, mask = self.masks(batch)
        tokens = self.fill(self.decoder_embed(encode_visible(self.encoder, batch["view/1"], ids_keep)), ids_keep)
        predictions = self.decode(tokens, self.chosen(batch))
        return torch.stack([self.error(s, y, batch, mask) for s, y in zip(self.scales, predictions, strict=True)])

    def masks(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """`noise` -> (B, V) visible patches, and (B, n) which are hidden."""
        units_keep, hidden = random_masking(batch["noise"], self.mask_ratio)
        coarse = (self.grid[0] // self.mask_unit, self.grid[1] // self.mask_unit)
        return self.units[units_keep].flatten(1), upsample_mask(hidden, coarse, self.mask_unit)

    def fill(self, latent: Tensor, ids_keep: Tensor) -> Tensor:
        """(B, prefix + V, D) -> (B, prefix + n, D): visible tokens at their places, mask tokens at the others."""
        B, _, D = latent.shape
        prefix, visible = latent[:, : self.prefix_tokens], latent[:, self.prefix_tokens :]
        grid = self.mask_token.to(latent.dtype).expand(B, self.grid[0] * self.grid[1], D)
        return torch.cat([prefix, grid.scatter(1, ids_keep[..., None].expand(-1, -1, D), visible)], dim=1)

    def decode(self, tokens: Tensor, chosen: Mapping[str, Tensor]) -> list[Tensor]:
        """(B, prefix + n, D) and by decoder (B, k) tiles -> for every scale (B, K, P*P*C) predicted patches."""
        decoded = {name: decoder(tokens, chosen.get(name)) for name, decoder in self.decoders.items()}
        return [self.head_of(section)(decoded[reads(section)]) for section in self.scales]

    def head_of(self, section: ScaleSection) -> nn.Module:
        """What turns decoded tokens into patches of a scale."""
        return self.decoder_of(section).head if section.tokens == "upsampled" else self.wide_heads[str(section.scale)]

    def decoder_of(self, section: ScaleSection) -> Decoder:
        """The decoder whose tokens predict a scale."""
        return cast(Decoder, self.decoders[reads(section)])

    def error(self, section: ScaleSection, prediction: Tensor, batch: Batch, mask: Tensor) -> Tensor:
        """Weighted sum over decoded patches of the mean squared error of a patch, in fp32."""
        patches = patchify(self.target_image(section, batch), self.patch_of(section))
        target = self.normalised(self.of_chosen(section, patches, batch))
        patch_errors = (prediction.float() - target).square().mean(-1)
        return (patch_errors * self.patch_weights(section, batch, mask)).sum()

    def counts(self, batch: Batch) -> Tensor:
        """(S,) sums of the weights of the patches that enter each loss."""
        _, mask = self.masks(batch)
        return torch.stack([self.patch_weights(section, batch, mask).sum() for section in self.scales])

    def begin_step(self, step: int, steps: int) -> None:
        """Lets attentions with random features draw new ones."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.begin_step(step)

    def distances(self) -> dict[str, int]:
        """Of the encoder's parameters from the decoders."""
        return distances(self.encoder)

    # ------------------------------------------------------------------------------------------ targets

    def target_image(self, section: ScaleSection, batch: Batch) -> Tensor:
        """(B, C, s*H, s*W) what a scale is to reconstruct."""
        if self.target == "source":
            return batch[f"view/{section.scale}"]
        return F.interpolate(batch["view/1"], scale_factor=float(section.scale), mode="nearest")

    def patches(self, section: ScaleSection, images: Tensor) -> Tensor:
        """(B, C, s*H, s*W) -> (B, N, P*P*C) as they are predicted."""
        return self.normalised(patchify(images, self.patch_of(section)))

    def normalised(self, patches: Tensor) -> Tensor:
        """(B, …, P*P*C) pixels as they are, or patch by patch with unit variance."""
        return normalise_patches(patches, self.variance_floor) if self.norm_pix else patches

    def patch_weights(self, section: ScaleSection, batch: Batch, mask: Tensor) -> Tensor:
        """(B, K) how much each decoded patch counts."""
        weights = self.fine_mask(section, mask).float()
        if section.loss_on == "all":
            weights = torch.ones_like(weights)
        if self.tissue_loss:
            weights = weights * torch.lerp(torch.ones_like(weights), batch[f"tissue/{section.scale}"], self.tissue_loss)
        return self.of_chosen(section, weights[..., None], batch)[..., 0]

    def fine_mask(self, section: ScaleSection, mask: Tensor) -> Tensor:
        """(B, n) -> (B, N): a predicted patch is hidden where the encoder's patch above it is."""
        return upsample_mask(mask, self.grid, self.grid_of(section)[0] // self.grid[0])

    def patch_of(self, section: ScaleSection) -> int:
        """P, side of a predicted patch in pixels of its view."""
        return self.p * (section.scale if section.tokens == "shared" else 1)

    def grid_of(self, section: ScaleSection) -> Grid:
        """Rows and columns of the predicted patches."""
        s = 1 if section.tokens == "shared" else section.scale
        return self.grid[0] * s, self.grid[1] * s

    # ------------------------------------------------------------------------------------------ tiles

    def chosen(self, batch: Batch) -> dict[str, Tensor]:
        """By decoder, where it decodes a part only: (B, k) tiles, those of the least noise."""
        return {
            reads(section): batch[f"tiles/{section.scale}"].argsort(dim=1, stable=True)[:, : decoder.chosen_tiles]
            for section in self.scales
            if section.decode_fraction < 1 and (decoder := self.decoder_of(section))
        }

    def of_chosen(self, section: ScaleSection, x: Tensor, batch: Batch) -> Tensor:
        """(B, N, D) of all patches -> (B, K, D) of those decoded in this step, in the decoder's order."""
        chosen = self.chosen(batch).get(reads(section))
        return x if chosen is None else gather_cells(x, self.decoder_of(section).tiles[chosen].flatten(1))

    # ------------------------------------------------------------------------------------------ looking

    def reconstruct(self, images: Tensor, ids_keep: Tensor) -> list[Tensor]:
        """(B, C, H, W) and (B, V) -> for every scale (B, N, P*P*C) predicted patches, all of them."""
        latent = self.decoder_embed(encode_visible(self.encoder, images, ids_keep))
        return self.decode(self.fill(latent, ids_keep), {})

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of what a sample of a batch holds."""
        (h, w), scales = self.grid, self.scales if self.target == "source" else ()
        shapes: dict[str, tuple[int, ...]] = {"noise": (len(self.units),)}
        for s in sorted({1, *(section.scale for section in scales)}):
            shapes[f"view/{s}"] = (self.channels, s * h * self.p, s * w * self.p)
        for section in self.scales:
            rows, columns = self.grid_of(section)
            if self.tissue_loss:
                shapes[f"tissue/{section.scale}"] = (rows * columns,)
            if section.decode_fraction < 1:
                shapes[f"tiles/{section.scale}"] = (len(self.decoder_of(section).tiles),)
        return shapes


@contextmanager
def naming(part: str) -> Iterator[None]:
    """Say in which part of the configuration a value is wrong."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{part}: {error}") from error


def reads(section: ScaleSection) -> str:
    """Name of the decoder whose tokens predict a scale."""
    return "1" if section.tokens == "shared" else str(section.scale)
