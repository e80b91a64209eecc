"""miram: high-resolution self-supervised pretraining for mammography on the hardware people have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if __name__ != "miram":
    raise ImportError("this folder is the package `miram`: install it (`pip install -e .`) and `import miram`")

from .version import __version__

if TYPE_CHECKING:
    from .pretrain.weights.loading import load_encoder

__all__ = ["__version__", "load_encoder"]


def __getattr__(name: str) -> Any:
    """`miram.load_encoder`, imported when asked for: `miram --help` need not wait for torch."""
    if name != "load_encoder":
        raise AttributeError(f"module 'miram' has no attribute {name!r}")
    from .pretrain.weights.loading import load_encoder

    return load_encoder
