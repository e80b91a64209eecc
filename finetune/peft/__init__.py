"""Parameter-efficient tuning: `apply(encoder, method, **options)`; every method states the closed form of its count."""

from .base import Method, Tuned
from .files import load, save
from .registry import METHODS, apply

__all__ = ["METHODS", "Method", "Tuned", "apply", "load", "save"]
