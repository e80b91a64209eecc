"""SAViT (Liu et al., IEEE TMI 2025): a ViT that goes over regions of an image one after the other, and its parts."""

from __future__ import annotations

from .backbone import LowRankAttention, SAViT, expected, savit_base, savit_small
from .mixpool import MixPool
from .prior import CrossAttention, SharedPrior
from .regions import Regions

__all__ = [
    "CrossAttention",
    "LowRankAttention",
    "MixPool",
    "Regions",
    "SAViT",
    "SharedPrior",
    "expected",
    "savit_base",
    "savit_small",
]
