"""Decoders: four maps of a plain ViT's patch tokens, all of one coarse grid, and the image -> logits of every pixel.

    linear   norm, 1x1, bilinear                       what the features are worth by themselves
    light    maps --> grid --> /8 --> /4 --> /2 --> /1 --> logits
             image ------------/8 <-- /4 <-- /2 <-- /1           the detail that a patch has no room for
    unetr    UNETR's: each map enlarged to a level of its own   (Hatamizadeh et al., WACV 2022, arXiv 2103.10504)

Every enlargement takes pixels for areas (align_corners=False), so that patch (i, j) stays over its own pixels.
Legend: B images, C channels, H W pixels; D width of tokens, h w patches, p pixels of a patch's side; K classes.
"""

from __future__ import annotations

from math import gcd
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...engine.errors import UserError
from .taps import COUNT, Taps

STRIDES = (1, 2, 4, 8)  # of the stem; those that are finer than a patch
PATCH = 16  # light's widths are given at this stride, and unetr's four doublings need it


class EncoderDecoder(nn.Module):
    """Images (B, C, H, W) of the encoder's size -> logits (B, K, H, W).

    Attributes:
        taps: holds the encoder, `taps.tuned`.
        decoder: (images, maps) -> logits.
    """

    def __init__(self, taps: Taps, decoder: nn.Module):
        super().__init__()
        self.taps, self.decoder = taps, decoder

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, K, H, W)."""
        logits: Tensor = self.decoder(images, self.taps(images))
        return logits


class Linear(nn.Module):
    """A linear classifier of patches on four layers at once: 4 D K + K numbers learn.

    The norm has no numbers that learn. It is a batch norm, because with running statistics the whole stays linear in
    the features; one over the image's own patches would make the finding's contrast depend on what else is there.
    """

    def __init__(self, dim: int, patch: tuple[int, int], in_chans: int, num_classes: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(COUNT * dim, affine=False)
        self.head = nn.Conv2d(COUNT * dim, num_classes, 1)

    def forward(self, images: Tensor, maps: list[Tensor]) -> Tensor:
        """(B, C, H, W) and 4 x (B, D, h, w) -> (B, K, H, W)."""
        return enlarge(self.head(self.norm(torch.cat(maps, dim=1))), images)


class Light(nn.Module):
    """The default: the maps meet on their grid, and are enlarged level by level beside convolutions of the image.

    The tokens know what a place is, but a patch is one token, and a lesion may be smaller. So the image itself comes in
    by convolutions at strides 1, 2, 4 and 8 (those below the patch). All levels are pooled and enlarged over areas, by
    maxima and bilinearly, and convolved after that: transposed convolutions leave a pattern of their stride. Group
    norms, since tiles come in small batches. `width` channels on the grid, and in proportion to the stride, but 8 at
    least, below a stride of 16: at 320 they are 20, 40, 80 and 160.

    4.0 M numbers on a ViT-S of 16-pixel patches, 4.5 M on a ViT-B.
    """

    def __init__(self, dim: int, patch: tuple[int, int], in_chans: int, num_classes: int, *, width: int = 320):
        super().__init__()
        widths = [max(8, width * stride // PATCH) for stride in STRIDES if stride < max(2, *patch)]
        enter = (in_chans, *widths)
        self.stem = nn.ModuleList(convolutions(*pair) for pair in zip(enter, widths, strict=False))
        self.neck = nn.Sequential(convolution(COUNT * dim, width, 1), convolutions(width, width))
        coarse = (*widths[1:], width)
        self.ups = nn.ModuleList(convolutions(below + c, c) for below, c in zip(coarse, widths, strict=True))
        self.head = nn.Conv2d(widths[0], num_classes, 1)

    def forward(self, images: Tensor, maps: list[Tensor]) -> Tensor:
        """(B, C, H, W) and 4 x (B, D, h, w) -> (B, K, H, W)."""
        skips = [self.stem[0](images)]
        for level in self.stem[1:]:
            skips.append(level(F.max_pool2d(skips[-1], 2, ceil_mode=True)))
        x = self.neck(torch.cat(maps, dim=1))
        for up, skip in zip(reversed(self.ups), reversed(skips), strict=True):
            x = up(torch.cat([enlarge(x, skip), skip], dim=1))
        logits: Tensor = self.head(x)
        return logits


class Unetr(nn.Module):
    """UNETR's decoder in two dimensions, of MONAI's blocks, with its residual blocks and instance norms.

    Maps 1 to 3 are doubled three, two and one times, by transposed convolutions, to 2, 4 and 8 feature_size channels;
    from map 4 the path up meets them and, at the end, the convolved image. 4.3 M numbers on a ViT-S, 5.4 M on a ViT-B.

    Raises:
        UserError: patches are not 16 x 16, which four doublings come from.
    """

    def __init__(self, dim: int, patch: tuple[int, int], in_chans: int, num_classes: int, *, feature_size: int = 32):
        super().__init__()
        from monai.networks.blocks.dynunet_block import UnetOutBlock
        from monai.networks.blocks.unetr_block import UnetrBasicBlock, UnetrPrUpBlock, UnetrUpBlock

        if patch != (PATCH, PATCH):
            raise UserError(
                f"unetr needs patches of {PATCH} x {PATCH} pixels, not {patch[0]} x {patch[1]}; choose light"
            )
        how: dict[str, Any] = {"kernel_size": 3, "norm_name": "instance", "res_block": True}
        f, once = feature_size, {"stride": 1, **how}
        self.image = UnetrBasicBlock(2, in_chans, f, **once)
        self.skips = nn.ModuleList(
            UnetrPrUpBlock(2, dim, f * 2**i, 3 - i, upsample_kernel_size=2, conv_block=True, **once) for i in (1, 2, 3)
        )
        below = (2 * f, 4 * f, 8 * f, dim)
        self.ups = nn.ModuleList(
            UnetrUpBlock(2, enter, f * 2**i, upsample_kernel_size=2, **how) for i, enter in enumerate(below)
        )
        self.head = UnetOutBlock(2, f, num_classes)

    def forward(self, images: Tensor, maps: list[Tensor]) -> Tensor:
        """(B, C, H, W) and 4 x (B, D, h, w) -> (B, K, H, W)."""
        skips = [self.image(images), *(skip(x) for skip, x in zip(self.skips, maps, strict=False))]
        x = maps[-1]
        for up, skip in zip(reversed(self.ups), reversed(skips), strict=True):
            x = up(x, skip)
        return cast(Tensor, self.head(x))


# ---------------------------------------------------------------------------------------------- parts


def enlarge(x: Tensor, like: Tensor) -> Tensor:
    """(B, c, h, w) -> (B, c, H, W) bilinearly, H and W those of `like`."""
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear")


def convolution(enter: int, leave: int, kernel: int) -> nn.Sequential:
    """(B, enter, H, W) -> (B, leave, H, W): convolution, group norm, GELU."""
    plain = nn.Conv2d(enter, leave, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(plain, nn.GroupNorm(gcd(8, leave), leave), nn.GELU())


def convolutions(enter: int, leave: int) -> nn.Sequential:
    """Two of them, 3x3."""
    return nn.Sequential(convolution(enter, leave, 3), convolution(leave, leave, 3))
