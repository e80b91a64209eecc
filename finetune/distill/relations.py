"""Token relations: a student learns how a teacher's tokens attend to each other, not what they are.

TinyMIM (Ren et al. 2023, arXiv 2301.01296): for the queries, keys and values of every head

    R_QK = softmax(Q K^T / sqrt(d)),  R_VV = softmax(V V^T / sqrt(d)),  L = KL(R_QK^T || R_QK^S) + KL(R_VV^T || R_VV^S)

of whole images without masks, means over heads and query tokens. A relation needs equal grids only, not equal widths.
`heads` splits the teacher's channels anew (relation heads of MiniLMv2, Wang et al. 2021, arXiv 2012.15828).

TinyMIM reads the student's Q, K, V in its last block, whose projection and FFN then learn nothing and stay as they
were drawn, to be mended by fine-tuning. Here encoders are also used as they are, so a projection of its own
reads the last, normed tokens: all of the encoder learns, and the projection is dropped afterwards. TinyMIM shows the
student a crop with colour jitter and the teacher the clean one; here both see the same.

Legend: B images, n tokens that both have, D width of the student, h heads of d channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...engine.errors import UserError
from ...engine.objective import Batch, Objective
from ...pretrain.encoder import Encoder, initialise
from ...pretrain.layers import distances
from .teacher import Teacher, shared


class Relations(Objective):
    """An encoder, and the projection to Q, K and V that is compared with a teacher's.

    Args:
        encoder: the student.
        teacher: of the same grid.
        heads: that the teacher's channels are split into; None: its own.
        weight: of both losses.

    Raises:
        UserError: the teacher has no plain attention, or its channels do not divide into so many heads.
    """

    loss_names = ("qk", "vv")

    def __init__(self, encoder: Encoder, teacher: Teacher, heads: int | None = None, weight: float = 1.0):
        super().__init__()
        self.loss_weights = (weight, weight)
        self.encoder, self.teacher = encoder, teacher
        Q, _, _ = teacher.attention(torch.zeros(1, *self.inputs["view/1"]))
        self.heads, width = heads or Q.shape[1], Q.shape[1] * Q.shape[3]
        if width % self.heads:
            raise UserError(f"distill.relation_heads: the teacher's {width} channels do not divide into {heads} heads")
        self.relate = nn.Linear(encoder.embed_dim, 3 * width)
        initialise(self.relate)

    def forward(self, batch: Batch) -> Tensor:
        """`view/1` (B, C, H, W) -> (2,) sums over images of the divergences of Q K and V V relations."""
        images, vit = batch["view/1"], self.teacher.vit
        tokens = shared(self.encoder.forward_features(images), self.encoder, vit)
        theirs = [shared(x, vit, self.encoder).transpose(1, 2).flatten(2) for x in self.teacher.attention(images)]
        ours = self.relate(tokens).chunk(3, dim=-1)
        (Q, K, V), (q, k, v) = ([self.split(x) for x in several] for several in (theirs, ours))
        return torch.stack([divergence(Q, K, q, k), divergence(V, V, v, v)])

    def split(self, x: Tensor) -> Tensor:
        """(B, n, h*d) -> (B, h, n, d) in fp32."""
        return x.float().unflatten(2, (self.heads, -1)).transpose(1, 2)

    def counts(self, batch: Batch) -> Tensor:
        """(2,) images."""
        images = batch["view/1"]
        return torch.full((2,), len(images), dtype=torch.float32, device=images.device)

    def distances(self) -> dict[str, int]:
        """Of the encoder's parameters from the projection."""
        return distances(self.encoder)

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of what a sample of a batch holds."""
        embed = self.encoder.patch_embed
        assert embed.img_size is not None
        return {"view/1": (embed.proj.in_channels, *embed.img_size)}


def divergence(A: Tensor, B: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """() sum over images of KL(softmax(A B^T / sqrt(d)) || softmax(a b^T / sqrt(d))), mean over heads and queries.

    Of (B, h, n, d) each. In fp32 whatever autocast says: bf16 has 8 bits, and the logits differ by less.
    """
    with torch.autocast(a.device.type, enabled=False):
        theirs, ours = (F.log_softmax(x @ y.mT / x.shape[-1] ** 0.5, dim=-1) for x, y in ((A, B), (a, b)))
        return F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1).mean((1, 2)).sum()
