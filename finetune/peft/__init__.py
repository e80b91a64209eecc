"""Parameter-efficient tuning: `apply(encoder, method, **options)`; every method states the closed form of its count."""

import logging

from .base import Method, Tuned
from .files import load, save
from .registry import METHODS, apply

__all__ = ["METHODS", "Method", "Tuned", "apply", "load", "save"]

# peft and transformers import torchao where it is there, which registers enums in a way that torch warns of.
logging.getLogger("torch.utils._pytree").addFilter(
    lambda record: "register_constant() on Enum" not in record.getMessage()
)
