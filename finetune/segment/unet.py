"""The convolutional baseline: MONAI's BasicUNet, the 2-D U-Net of Falk et al. (Nature Methods 2019)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

STEP = 16  # four halvings
LEAST = 32  # an instance norm needs more than one pixel at the bottom


class UNet(nn.Module):
    """Images (B, C, H, W) of any size -> logits (B, K, H, W); 7.8 M numbers at the default channels.

    BasicUNet rather than MONAI's UNet: that one passes the logits themselves through an instance norm where it has
    residual units, so that they have the same mean over an image whether or not anything is there. This one ends in a
    plain 1x1 convolution of full-size features.

    Args:
        in_chans: C.
        num_classes: K.
        channels: of its five levels, from full size to 1/16.
    """

    def __init__(self, in_chans: int, num_classes: int, channels: Sequence[int] = (32, 64, 128, 256, 512)):
        super().__init__()
        from monai.networks.nets.basic_unet import BasicUNet

        self.net = BasicUNet(2, in_chans, num_classes, features=(*channels, channels[0]))

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, K, H, W); padded at the right and bottom by repeating the edge, and cropped after."""
        height, width = images.shape[-2:]
        right, bottom = (max(LEAST, side + -side % STEP) - side for side in (width, height))
        padded = F.pad(images, (0, right, 0, bottom), mode="replicate") if right or bottom else images
        logits: Tensor = self.net(padded)
        return logits[..., :height, :width]
