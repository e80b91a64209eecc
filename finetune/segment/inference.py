"""What a model says of a whole image: tiles of its raster, blended, brought back to the stored size.

stored (H, W) -> raster (h, w) -> tiles, where there is tissue -> softmax -> blended -> bilinear -> (K, H, W)

Probabilities are blended, not logits: a tile that is sure cannot shout the others down. Tiles of air are not read;
there background is certain. The blend lies in ordinary memory, whatever device the model is on.

Of a tile n pixels wide that overlaps by half, what lies r pixels from its edge weighs exp(32 r / n - 8) of what its
neighbour says there, or less. By so much of the change that padding makes does a model that looks r pixels far differ,
tile by tile, from itself on the whole raster; at the image's edge, where both are padded, it does not differ more.

Legend: B tiles at once, C channels, K classes, H and W of the stored image, h and w of its raster.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from monai.inferers.utils import sliding_window_inference
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad
from torch.signal.windows import gaussian

from ...data.crops import Resolution, to_raster
from ...data.findings import TOUCHING
from ...data.resample import Size
from ...data.shards import Sample
from ...data.views import Normalisation

ROOM = 1e-6  # of a pixel, for the rounding of a share


@dataclass(frozen=True)
class Reading:
    """How a model reads an image.

    Args:
        size: height and width of a tile.
        resolution: of the raster that tiles are cut from.
        normalise: of the model.
        overlap: share of a tile that its neighbour repeats, below 1.
        flips: sets of dimensions, -2 down and -1 across: each tile is also read flipped so, and the answers averaged.
        batch_size: tiles at once. It changes nothing but the last bits.
    """

    size: Size
    resolution: Resolution
    normalise: Normalisation
    overlap: float = 0.5
    flips: tuple[tuple[int, ...], ...] = ()
    batch_size: int = 8


@torch.inference_mode()
def probabilities(
    model: nn.Module, sample: Sample, how: Reading, device: torch.device | str = "cpu"
) -> NDArray[np.float32]:
    """(K, H, W) probabilities of the classes at each stored pixel.

    Args:
        model: normalised images (B, C, *size) -> logits (B, K, *size). It is put on the device, and left in the mode
            it was in.
        sample: the image; its mask is not looked at.
        how: tiles, resolution, blending.
        device: where the model runs.

    Raises:
        ValueError: the resolution is in millimetres, and the image's spacing is unknown or coarser.
    """
    seen = torch.from_numpy(to_raster(sample, how.resolution))
    h, w = seen.shape[-2:]
    held = pad(seen, (0, max(0, how.size[1] - w), 0, max(0, how.size[0] - h)))  # air, before it is normalised
    tissue = held.any(dim=0, keepdim=True)
    raster = torch.cat([torch.from_numpy(how.normalise(held.numpy())), tissue.to(held)])[None]
    model, training = model.to(device), model.training
    try:
        said = sliding_window_inference(
            raster,
            how.size,
            how.batch_size,
            _Teller(model.eval(), how.flips),
            [_overlap(*sides, how.overlap) for sides in zip(raster.shape[-2:], how.size, strict=True)],
            roi_weight_map=_weights(how.size),
            sw_device=device,
            device="cpu",
        )
    finally:
        model.train(training)
    assert isinstance(said, Tensor), "a model gives one tensor"
    stored = interpolate(said[..., :h, :w], sample.pixels.shape[:2], mode="bilinear", align_corners=False)
    return np.asarray(stored[0].numpy(), np.float32)


def _weights(size: Size) -> Tensor:
    """(*size) what a tile counts: a Gaussian, an eighth of the tile wide.

    MONAI's own ends at 1e-3, which along the edge of an image no tile exceeds: all would count alike there, and the
    seams be seen.
    """
    down, across = (gaussian(side, std=side / 8) for side in size)
    return down[:, None] * across


def _overlap(length: int, side: int, least: float) -> float:
    """What MONAI must be told for the fewest tiles that overlap by `least`, evenly from end to end.

    By itself it moves the last tile back alone: the one before then ends where no tile has its middle.
    """
    step = max(1, int(side * (1 - least) + ROOM))
    count = math.ceil(max(length - side, 0) / step)
    even = math.ceil((length - side) / count) if count else side
    return max(0.0, 1 - (even + 0.25) / side)  # it rounds down


class _Teller:
    """Probabilities of tiles (B, C + 1, *size), the last channel saying where there is tissue."""

    def __init__(self, model: nn.Module, flips: tuple[tuple[int, ...], ...]):
        self.model, self.flips = model, ((), *flips)
        self.classes = 0  # until a tile was read

    def __call__(self, tiles: Tensor) -> Tensor:
        held = tiles[:, -1].flatten(1).any(dim=1)
        made = self._background(tiles) if self.classes and not held.any() else None
        if made is None:
            # Where the first tiles are all air, one is read: only an answer tells how many classes there are.
            told = self._mean(tiles[held if held.any() else slice(1), :-1])
            self.classes = told.shape[1]
            made = self._background(tiles)
            made[held] = told[: int(held.sum())]
        return made

    def _mean(self, images: Tensor) -> Tensor:
        """The mean over the ways to read them."""
        total = torch.zeros((), device=images.device)
        for dims in self.flips:
            total = total + self.model(images.flip(dims)).float().softmax(dim=1).flip(dims)
        return total / len(self.flips)

    def _background(self, tiles: Tensor) -> Tensor:
        made = tiles.new_zeros((len(tiles), self.classes, *tiles.shape[-2:]))
        made[:, 0] = 1
        return made


def masked(
    told: NDArray[np.float32], thresholds: tuple[float, ...] | None = None, smallest: int = 0
) -> NDArray[np.uint8]:
    """(H, W) class numbers that probabilities (K, H, W) come to.

    Args:
        told: probabilities.
        thresholds: of the classes 1 to K - 1: the most probable of those that reach theirs, else background. None: the
            most probable of all.
        smallest: components (pixels of one class that touch, at a corner too) of fewer pixels become background.
    """
    if thresholds is None:
        said = told.argmax(axis=0).astype(np.uint8)
    else:
        assert len(thresholds) == len(told) - 1, "each class but background has a threshold"
        reached = np.where(told[1:] >= np.array(thresholds, np.float32)[:, None, None], told[1:], np.float32(-1))
        said = np.where((reached >= 0).any(axis=0), 1 + reached.argmax(axis=0), 0).astype(np.uint8)
    if smallest > 1:
        _drop(said, smallest)
    return said


def _drop(said: NDArray[np.uint8], smallest: int) -> None:
    """Make small components background, in place."""
    for value, box in enumerate(ndimage.find_objects(said), 1):
        if box is not None:
            numbers, _ = ndimage.label(said[box] == value, TOUCHING)
            small = np.bincount(numbers.ravel()) < smallest
            small[0] = False
            said[box][small[numbers]] = 0
