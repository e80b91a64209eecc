"""The images that a monitor takes features of: whole ones, read once and kept."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from timm.models.vision_transformer import VisionTransformer

from ...data.shards import Sample, ShardDataset
from ...data.store.local import Outage
from ...engine.errors import UserError
from ..features import Windows, image_features, window_batches

TOKENS_AT_ONCE = 8192  # a look must fit beside a training


def spread(n: int, most: int) -> list[int]:
    """At most so many of 0 … n-1, evenly spread: neighbours in a data set are often of one patient."""
    taken = min(n, most)
    return [i * n // taken for i in range(taken)]


class Album:
    """Whole images as the probe sees them, in windows of the encoder's input size.

    They are read at the first look and stay in memory: 4 bytes a pixel and channel, about two windows an image whose
    height is twice its width (256 mammograms at 224 x 224: 100 MB).

    Args:
        vit: the encoder.
        shards: the data set.
        rows: which of its images.

    Raises:
        UserError: the encoder's channels are not the data's.
    """

    def __init__(self, vit: VisionTransformer, shards: ShardDataset, rows: list[int]):
        channels = vit.patch_embed.proj.in_channels
        if channels != shards.channels:
            raise UserError(
                f"monitor.shards has {shards.channels} channels and data.shards {channels}; ingest it again with "
                f"--channels {channels}"
            )
        self.vit, self.shards, self.rows = vit, shards, rows
        self.read: list[int] = []  # places in `rows` of the images that could be read

    def features(self) -> NDArray[np.float32]:
        """(n, D) of the n images that could be read, as the probe takes them: mean of the patch tokens."""
        return image_features(self.vit, self.windows, len(self.read))

    @cached_property
    def windows(self) -> list[Windows]:
        """All images; a damaged one is named and left out, because a look must not stop a training."""
        tokens = self.vit.patch_embed.num_patches + self.vit.num_prefix_tokens
        return list(window_batches(self.vit, self._samples(), max(1, TOKENS_AT_ONCE // tokens)))

    def _samples(self) -> Iterator[Sample]:
        self.read.clear()
        for place, row in enumerate(self.rows):
            try:
                sample = self.shards[row]
            except Outage:  # a network that is down is no damage
                raise
            except UserError as error:
                print(f"miram: monitor: left out: {error}", file=sys.stderr, flush=True)
                continue
            self.read.append(place)
            yield sample
