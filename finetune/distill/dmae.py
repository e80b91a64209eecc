"""DMAE: a masked autoencoder that also learns a larger one's tokens (Bai et al. 2023, arXiv 2208.12256).

Teacher and student see the same visible patches, a quarter of the image, which makes the teacher cheap. The student
reconstructs the image, and a linear map of its tokens at 3/4 of its depth must point where the teacher's tokens of
the same patches at 3/4 of its depth do:

    L = L_reconstruction + weight / sqrt(D) * | z_T / |z_T| - f(z_S) / |f(z_S)| |_1      mean over tokens

Here the student is any MIRAM, with all of its scales. The released code lets the teacher draw the masks and runs it to
the end, its decoder too; here both are told the masks, and the teacher stops at the block that is read. As in
that code the class token counts like a patch, where both have one. That code takes the mean over the D channels of
the teacher, which shrinks like 1 / sqrt(D) and is hardly heard beside the reconstruction; here it lies between 0 and 2
whatever D is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...engine.objective import Batch, Objective
from ...pretrain.encoder import Encoder, initialise, layers
from ...pretrain.miram import Miram
from .teacher import Teacher, block_at, shared


class Dmae(Objective):
    """A MIRAM with a teacher: its losses, and one more called `tokens`.

    Args:
        student: a masked autoencoder.
        teacher: of the student's grid.
        depth: share of the student's blocks after which its tokens are compared.
        weight: of their loss.
    """

    def __init__(self, student: Miram, teacher: Teacher, depth: float = 0.75, weight: float = 1.0):
        super().__init__()
        self.loss_names = (*student.loss_names, "tokens")
        self.loss_weights = (*student.loss_weights, weight)
        self.student, self.teacher = student, teacher
        self.block = block_at(self.encoder, depth)
        self.project = nn.Linear(self.encoder.embed_dim, teacher.vit.embed_dim)
        initialise(self.project)

    @property
    def encoder(self) -> Encoder:
        """The student's."""
        return self.student.encoder

    def forward(self, batch: Batch) -> Tensor:
        """A batch of the student's `inputs` -> (S + 1,) sums: its patch errors, and the distances of its tokens."""
        student, images = self.student, batch["view/1"]
        ids_keep, mask = student.masks(batch)
        seen = list(layers(self.encoder, images, ids_keep))
        tokens = student.fill(student.decoder_embed(self.encoder.norm(seen[-1])), ids_keep)
        predictions = student.decode(tokens, student.chosen(batch))
        errors = [student.error(s, y, batch, mask) for s, y in zip(student.scales, predictions, strict=True)]
        return torch.stack([*errors, self.token_error(seen[self.block - 1], images, ids_keep)])

    def token_error(self, tokens: Tensor, images: Tensor, ids_keep: Tensor) -> Tensor:
        """() sum over tokens of the L1 distance of their directions over sqrt(D), in fp32."""
        vit = self.teacher.vit
        theirs = shared(self.teacher.tokens(images, ids_keep), vit, self.encoder)
        ours = self.project(shared(tokens, self.encoder, vit))
        theirs, ours = F.normalize(theirs.float(), dim=-1), F.normalize(ours.float(), dim=-1)
        return (theirs - ours).abs().sum() / theirs.shape[-1] ** 0.5

    def counts(self, batch: Batch) -> Tensor:
        """(S + 1,) what the student's losses count, and the compared tokens."""
        ids_keep, _ = self.student.masks(batch)
        first = self.encoder.cls_token is not None and self.teacher.vit.cls_token is not None
        tokens = ids_keep.new_tensor([len(ids_keep) * (ids_keep.shape[1] + first)])
        return torch.cat([self.student.counts(batch), tokens.float()])

    def begin_step(self, step: int, steps: int) -> None:
        """As the student's decoders ask for."""
        self.student.begin_step(step, steps)

    def distances(self) -> dict[str, int]:
        """Of the student's parameters from its losses."""
        return {f"student.{name}": distance for name, distance in self.student.distances().items()}
