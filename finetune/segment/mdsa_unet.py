"""MDSA-UNet (Li et al., IEEE JBHI 2025, doi 10.1109/JBHI.2025.3555805): a U-Net whose blocks are MDSA's.

    image H x W --EDM--> /4, blocks ------------------------------------------> EUF, blocks --1x1--> x4 --> logits
                          '--EDM--> /8, blocks ----------------> EUF, blocks --'
                                     '--EDM--> /16, blocks ------'

The article is closed: its training recipe and splits are not public, and what it reports is not claimed of this model.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import lcm
from typing import Any, Literal, get_args, get_type_hints

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...engine.errors import UserError
from ...pretrain.attention.base import Grid
from .mdsa import Block, Switches

KERNELS, STRIDES = (7, 3, 3), (4, 2, 2)
WINDOW = 32  # pixels a side of a window where their number follows the image: 8, 4 and 2 tokens in the three stages
Padding = Literal["edge", "zero", "none"]
RELEASED: dict[str, Any] = {
    "windows": 7,
    "scale": "dim",
    "drop": "dropout",
    "norm": "batch",
    "qkv": "shared",
    "padding": "none",
}


class Down(nn.Module):
    """EDM, enhanced downsampling merging: a strided convolution beside one at full size that is max-pooled; their sum.

    (9/8) c_in c_out k^2 + c_out^2 / 8 + 6.375 c_out numbers.
    """

    def __init__(self, enter: int, leave: int, kernel: int, stride: int, switches: Switches):
        super().__init__()
        half, narrow, norm = kernel // 2, leave // 8, switches.normalisation
        self.strided = nn.Sequential(nn.Conv2d(enter, leave, kernel, stride, half), norm(leave), nn.ReLU())
        self.pooled = nn.Sequential(
            nn.Conv2d(enter, narrow, kernel, 1, half),
            norm(narrow),
            nn.MaxPool2d(kernel, stride, half),
            nn.Conv2d(narrow, leave, 1),
            norm(leave),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, c_in, H, W) -> (B, c_out, H / stride, W / stride)."""
        out: Tensor = self.strided(x) + self.pooled(x)
        return out


class Up(nn.Module):
    """EUF, enhanced upsampling fusion: enlarged and stacked on the skip, then a 1x1 beside a narrow 3x3; their sum.

    (17/8) (c_in + c_skip) c_out + c_out^2 / 8 + 6.375 c_out numbers; c_skip = c_out.
    """

    def __init__(self, enter: int, leave: int, switches: Switches):
        super().__init__()
        stacked, narrow, norm = enter + leave, leave // 8, switches.normalisation
        self.plain = nn.Sequential(nn.Conv2d(stacked, leave, 1), norm(leave), nn.ReLU())
        self.wide = nn.Sequential(
            nn.Conv2d(stacked, narrow, 3, 1, 1), norm(narrow), nn.Conv2d(narrow, leave, 1), norm(leave), nn.ReLU()
        )

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """(B, c_in, h, w) and (B, c_out, H, W) -> (B, c_out, H, W)."""
        x = F.interpolate(x, size=skip.shape[2:], mode="bilinear")
        x = torch.cat([x, skip], dim=1)
        out: Tensor = self.plain(x) + self.wide(x)
        return out


class MDSAUNet(nn.Module):
    """Images (B, in_chans, H, W) of any size -> logits (B, num_classes, H, W).

    6,576,225 numbers for 3 channels and 1 class, as in the authors' release, and 6,645,089 with mlp_ratios (3, 2, 2),
    which is the article's 6.65 M; that it had these ratios is inferred from the count, not stated. What changes the
    count is by default as released; of the rest, what we hold to be better, from reasons and not from a comparison.
    `MDSAUNet.released` has all of the release's choices.

    Args:
        mlp_ratios, dims, depths, topks: of the three stages; a stage of the decoder is as the encoder's of its width.
            dims are multiples of head_dim and of 8; topks are windows a window attends to, at most.
        windows: "auto": one for every 32 pixels of a side, so that a window has 8, 4 and 2 tokens a side at any size,
            and a query meets 64 keys; a number: that many a side (released: 7, which makes attention cost 16 times as
            much for twice the side, where "auto" costs 4 to 5 times).
        scale: of attention's logits: "head", 1 / sqrt(head_dim), as usual, so that sharpness does not depend on the
            width; "dim", 1 / sqrt(C) (released), makes them 2 to 4 times smaller and attention flatter.
        drop: "path" drops an image's whole branch (stochastic depth), which leaves the statistics within a map alone;
            "dropout" (released, where its name is drop path) drops single numbers of a branch.
        rate: chance of either.
        norm: after convolutions: "group" gives an image the same whatever its batch, and batches of tiles are small and
            hold much air; "batch" (released) has running means.
        qkv: "shared": queries, keys and values are all the aggregated map (released; in the code a linear layer is
            commented out); "learned": that layer, 3 C^2 + 3 C more numbers a block.
        padding: to a multiple of 32 (of 16 `windows` where that is a number), at the right and bottom, cropped after.
            "edge" repeats the last row and column: no border that is not in the image; "zero" is the mean grey of
            normalised images; "none" (released) refuses such sizes.

    Raises:
        UserError: options that do not go together; an image that padding="none" refuses.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1,
        mlp_ratios: Sequence[float] = (2, 2, 2),
        *,
        dims: Sequence[int] = (128, 320, 512),
        depths: Sequence[int] = (1, 1, 1),
        topks: Sequence[int] = (1, 4, 16),
        head_dim: int = 32,
        windows: int | Literal["auto"] = "auto",
        scale: Literal["head", "dim"] = "head",
        drop: Literal["path", "dropout"] = "path",
        rate: float = 0.1,
        norm: Literal["group", "batch"] = "group",
        qkv: Literal["shared", "learned"] = "shared",
        padding: Padding = "edge",
    ):
        super().__init__()
        switches = Switches(head_dim, scale, drop, rate, norm, qkv)
        _check(switches, windows, padding, mlp_ratios=mlp_ratios, dims=dims, depths=depths, topks=topks)
        self.windows, self.padding = windows, padding
        self.in_chans, self.num_classes = in_chans, num_classes
        enter = (in_chans, *dims)
        self.downs = nn.ModuleList(Down(*plan, switches) for plan in zip(enter, dims, KERNELS, STRIDES, strict=False))
        self.ups = nn.ModuleList(Up(dims[i + 1], dims[i], switches) for i in (1, 0))
        self.encoder, self.decoder = (
            nn.ModuleList(
                nn.ModuleList(Block(dims[i], topks[i], mlp_ratios[i], switches) for _ in range(depths[i]))
                for i in stages
            )
            for stages in ((0, 1, 2), (1, 0))
        )
        self.head = nn.Conv2d(dims[0], num_classes, 1)
        self.reset_parameters()

    @classmethod
    def released(cls, in_chans: int = 3, num_classes: int = 1, **options: Any) -> MDSAUNet:
        """With every choice as in the authors' release: sizes must be multiples of 112."""
        return cls(in_chans, num_classes, **{**RELEASED, **options})

    def reset_parameters(self) -> None:
        """Linear layers (1 x 1 convolutions) begin truncated-normal of deviation .02, biases at 0, as in timm."""
        for part in self.modules():
            if isinstance(part, nn.Conv2d) and part.kernel_size == (1, 1):
                nn.init.trunc_normal_(part.weight, std=0.02)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)

    def forward(self, images: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, num_classes, H, W)."""
        height, width = images.shape[2:]
        x = self.pad(images)
        grid = self.grid((x.shape[2], x.shape[3]))
        skips: list[Tensor] = []
        for down, blocks in zip(self.downs, self.encoder, strict=True):
            x = _through(blocks, down(x), grid)
            skips.append(x)
        for up, blocks, skip in zip(self.ups, self.decoder, skips[-2::-1], strict=True):
            x = _through(blocks, up(x, skip), grid)
        logits = F.interpolate(self.head(x), scale_factor=STRIDES[0], mode="bilinear")
        return logits[..., :height, :width]

    def grid(self, size: tuple[int, int]) -> Grid:
        """(rows, columns) of windows in a padded image; the same in every stage."""
        return (size[0] // WINDOW, size[1] // WINDOW) if self.windows == "auto" else (self.windows, self.windows)

    def pad(self, images: Tensor) -> Tensor:
        """To the next size that windows divide, in every stage."""
        step = WINDOW if self.windows == "auto" else 16 * self.windows
        height, width = images.shape[2:]
        extra = (0, -width % step, 0, -height % step)
        if not any(extra):
            return images
        if self.padding == "none":
            raise UserError(
                f"mdsa_unet: an image of {height} x {width} is no multiple of {step}, and padding is none; "
                "choose padding: edge, or another size"
            )
        return F.pad(images, extra, mode="replicate" if self.padding == "edge" else "constant")


def _through(blocks: nn.Module, x: Tensor, grid: Grid) -> Tensor:
    for block in blocks.children():
        x = block(x, grid)
    return x


def _check(switches: Switches, windows: int | str, padding: str, **stages: Sequence[float]) -> None:
    for name, numbers in stages.items():
        if len(numbers) != len(STRIDES) or min(numbers) <= 0:
            raise UserError(f"mdsa_unet: {name} must be three numbers above 0, one for each stage, not {numbers}")
    for name, kind in {**get_type_hints(Switches), "padding": Padding}.items():
        value, known = getattr(switches, name, padding), get_args(kind)
        if known and value not in known:
            raise UserError(f"mdsa_unet: {name} must be one of {', '.join(known)}, not {value!r}")
    unit = lcm(8, switches.head_dim) if switches.head_dim > 0 else 0
    if not unit or any(dim % unit for dim in stages["dims"]):
        raise UserError(
            f"mdsa_unet: dims must be multiples of 8 and of head_dim, {switches.head_dim}; not {stages['dims']}"
        )
    if windows != "auto" and (not isinstance(windows, int) or windows < 1):
        raise UserError(f'mdsa_unet: windows must be "auto" or a number of 1 or more, not {windows!r}')
    if not 0 <= switches.rate < 1:
        raise UserError(f"mdsa_unet: rate must be in [0, 1), not {switches.rate}")
