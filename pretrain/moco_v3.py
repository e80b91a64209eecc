"""MoCo v3: two views of an image must find each other among the views of a batch (Chen et al. 2021, arXiv 2104.02057).

Queries come from encoder, projector and predictor; keys from a slow copy of encoder and projector. There is no queue:
a query's negatives are the other keys of the global batch, of all ranks. The encoder's pooled output is what is
learnt; projector and predictor are dropped afterwards.

As in the authors' code: batch norm over the global batch in every head (the slow projector's statistics are those of
its own input, not averages of the other's), heads at torch's own initialisation, and the patch projection left at
its random start in both copies.

Legend: B images of this rank, N of all ranks, D width of the encoder, d of the space of the contrast, tau temperature.
"""

from __future__ import annotations

from copy import deepcopy
from itertools import pairwise
from math import cos, pi

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..engine.errors import UserError
from ..engine.objective import Batch, Objective
from ..engine.recipe import TrainSection
from .config import MocoSection
from .encoder import Encoder
from .layers import distances
from .sync_norm import GlobalBatchNorm, gather, rank, upcast


class MocoV3(Objective):
    """Encoder, projector, predictor, and the slow copies that give the keys.

    Args:
        encoder: a ViT with its starting weights: the slow copy is taken here and now.
        section: dimensions, temperature, momentum; whether the patch projection learns.

    Raises:
        UserError: the encoder does not pool.
    """

    loss_names = ("contrast",)
    loss_weights = (1.0,)

    def __init__(self, encoder: Encoder, section: MocoSection):
        super().__init__()
        if not encoder.global_pool:
            raise UserError(
                "model.encoder_options.global_pool: moco_v3 compares whole images and needs a pooled output; use token"
            )
        self.temperature, self.momentum = section.temperature, section.momentum
        encoder.patch_embed.proj.requires_grad_(not section.freeze_patch_projection)
        self.encoder = encoder
        self.projector = mlp(encoder.embed_dim, section.hidden, section.hidden, section.dim)
        self.predictor = mlp(section.dim, section.hidden, section.dim)
        self.momentum_encoder = deepcopy(encoder).requires_grad_(False)
        self.momentum_encoder.set_grad_checkpointing(False)  # keys have no backward pass to save memory for
        self.momentum_projector = deepcopy(self.projector).requires_grad_(False)

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        """Shape of one sample's tensors in a batch."""
        embed = self.encoder.patch_embed
        assert embed.img_size is not None
        return {f"view/{name}": (embed.proj.in_channels, *embed.img_size) for name in "ab"}

    def begin_step(self, step: int, steps: int) -> None:
        """Move the slow copy: theta_k <- m theta_k + (1 - m) theta_q (section 3)."""
        self.follow(self.momentum_at(step, steps))

    def momentum_at(self, step: int, steps: int) -> float:
        """m(t) = 1 - (1 - m_0) (1 + cos(pi t / T)) / 2: from m_0 up to 1."""
        return 1 - (1 - self.momentum) * (1 + cos(pi * step / steps)) / 2

    @torch.no_grad()
    def follow(self, m: float) -> None:
        """Move the slow copy by 1 - m of its distance; what is frozen is equal in both and stays so to the bit."""
        pairs = ((self.momentum_encoder, self.encoder), (self.momentum_projector, self.projector))
        for slow, fast in pairs:
            for theta_k, theta_q in zip(slow.parameters(), fast.parameters(), strict=True):
                if theta_q.requires_grad:
                    theta_k.lerp_(theta_q, 1 - m)

    def forward(self, batch: Batch) -> Tensor:
        """`view/a` and `view/b` (B, C, H, W) -> (1,) sum over images of ctr(q1, k2) + ctr(q2, k1) (algorithm 1)."""
        x1, x2 = batch["view/a"], batch["view/b"]
        q1, q2 = self.queries(x1), self.queries(x2)
        k1, k2 = self.keys(x1), self.keys(x2)
        return (contrast(q1, k2, self.temperature) + contrast(q2, k1, self.temperature)).reshape(1)

    def queries(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, d)."""
        return self.predictor(self.projector(self.encoder(images)))

    @torch.no_grad()
    def keys(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, d), without gradient."""
        return self.momentum_projector(self.momentum_encoder(images))

    def counts(self, batch: Batch) -> Tensor:
        """(1,) images."""
        images = batch["view/a"]
        return torch.full((1,), len(images), dtype=torch.float32, device=images.device)

    def distances(self) -> dict[str, int]:
        """Of the encoder's parameters from the projector; the slow copies do not learn by gradient."""
        return distances(self.encoder)


def contrast(q: Tensor, k: Tensor, tau: float) -> Tensor:
    """(B, d) queries and (B, d) keys of the same images -> sum over images of 2 tau CE(q . K / tau) (equation 1).

    K are the keys of all ranks, (N, d). In fp32 or finer whatever autocast says: bf16 has 8 bits, and the logits differ
    by less.
    """
    with torch.autocast(q.device.type, enabled=False):
        q, k = F.normalize(upcast(q), dim=1), F.normalize(upcast(k), dim=1)
        logits = q @ gather(k).T / tau
        own = rank() * len(q) + torch.arange(len(q), device=q.device)
        return 2 * tau * F.cross_entropy(logits, own, reduction="sum")


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers without bias, each with batch norm; ReLU between, and no affine map at the end (appendix A)."""
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(widths):
        layers += [nn.Linear(d_in, d_out, bias=False), GlobalBatchNorm(d_out), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-2], GlobalBatchNorm(widths[-1], affine=False))


def initialise_qkv(vit: Encoder) -> None:
    """Q, K and V xavier-uniform as the three matrices they are: MAE, which draws them as one, starts them smaller."""
    for name, part in vit.named_modules():
        if name.endswith("qkv") and isinstance(part, nn.Linear):
            for matrix in part.weight.chunk(3):
                nn.init.xavier_uniform_(matrix)


def refuse_accumulation(train: TrainSection, world: int) -> None:
    """Negatives are the images held at once: accumulating would silently leave fewer of them than configured.

    Raises:
        UserError: the batch is accumulated, or a single image.
    """
    if train.batch_size < 2:
        raise UserError(f"train.batch_size={train.batch_size}: moco_v3 tells images apart and needs 2 at least")
    held = (train.micro_batch or train.batch_size) * world
    if held < train.batch_size:
        raise UserError(
            f"train.micro_batch={train.micro_batch}: moco_v3 contrasts only images held at once, and would see "
            f"{held} of the {train.batch_size} of train.batch_size; leave train.micro_batch out (model.checkpointing "
            f"saves memory), or set train.batch_size={held}"
        )
