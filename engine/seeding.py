"""Randomness as a pure function of what it is for, so that no worker, rank or restart can change it."""

from __future__ import annotations

import hashlib
import json

import numpy as np


def stable_seed(*parts: int | str) -> int:
    """A 64-bit seed from any parts; equal on every machine and Python (unlike `hash`)."""
    return int.from_bytes(hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest())


def generator(*parts: int | str) -> np.random.Generator:
    """A numpy generator of its own for these parts, e.g. `generator(seed, epoch, "mask", key)`."""
    return np.random.default_rng(stable_seed(*parts))
