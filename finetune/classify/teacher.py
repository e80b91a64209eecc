"""A locked classifier that teaches another one: its answers to the student's own training views are learnt, too.

    loss = (1 - w) loss(label) + w T^2 KL(teacher / T || student / T)        Hinton et al. 2015, arXiv 1503.02531

KL is that of the classes' softmax; where every output is a question of its own (multilabel, ordinal) it is that of yes
and no, a mean over questions. Classes weigh alike in it: balance is what labels are weighed for. The teacher is frozen
and belongs to no module of the student, which stands without it. It must not have learnt from anybody who is judged,
and who it learnt from counts as known to the student as well.

Legend: B images, w outputs of the head.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ...data.shards import ShardDataset
from ...data.views import Normalisation
from ...engine.errors import UserError
from ...engine.metrics import Estimate, Ints, Kind, headline
from ...pretrain.encoder import Encoder, normalisation
from ..change import hashed
from ..peft.base import Tuned
from ..sealed import CARD, CLASSIFIER, read_card, refuse_unfinished
from .bootstrap import Draws
from .cards import ModelCard
from .config import FinetuneSection, TeacherSection
from .judged import Judged
from .judging import at_levels
from .labels import Labelled
from .locked import Locked, read_locked, refuse_channels
from .units import counted


@dataclass(frozen=True, eq=False)
class Teacher:
    """A locked model and how it is listened to.

    Attributes:
        locked: the model, of frames.
        weight: w, of its answers.
        temperature: T.
        normalise: of the student's views.
    """

    locked: Locked
    weight: float
    temperature: float
    normalise: Normalisation

    def __deepcopy__(self, memo: dict[int, Any]) -> Teacher:
        return self  # nothing in it changes, and a copy of the student needs no second one

    def losses(self, logits: Tensor, images: Tensor) -> Tensor:
        """(B,) of the student's (B, w) logits of its (B, C, H, W) views, in fp32 or finer whatever autocast says."""
        told = self.answers(images)
        with torch.autocast(logits.device.type, enabled=False):
            student, teacher = ((x if x.dtype == torch.float64 else x.float()) for x in (logits, told))
            return divergence(self.locked.target.kind, student, teacher, self.temperature)

    @torch.no_grad()
    def answers(self, images: Tensor) -> Tensor:
        """(B, w) logits of the student's views, as the teacher would have been shown them."""
        model = self.locked.model
        assert isinstance(model, Tuned)
        out: Tensor = model.to(images.device).eval()(self.views(images))
        return out

    def views(self, images: Tensor) -> Tensor:
        """The student's normalised (B, C, H, W) in the teacher's size, averaged where that is smaller, normalised."""
        card = self.locked.card

        def channels(values: float | tuple[float, ...]) -> Tensor:
            return torch.tensor(values, dtype=images.dtype, device=images.device).reshape(-1, 1, 1)

        pixels = images * channels(self.normalise.std) + channels(self.normalise.mean)
        if tuple(images.shape[-2:]) != tuple(card.image_size):
            pixels = F.interpolate(pixels, card.image_size, mode="bilinear", antialias=True)
        return (pixels - channels(card.mean)) / channels(card.std)

    def figure(self, shards: ShardDataset, judged: Judged, section: FinetuneSection, seed: int) -> Estimate | None:
        """The leading metric of the teacher on images that students judged, with its interval."""
        labelled, images = judged.labelled, judged.images
        own = Judged(
            labelled=labelled,
            images=images,
            logits=self.locked.logits(shards, np.asarray(labelled.rows[images], np.int64), section.batch_size),
            fold=np.zeros(len(images), np.int64),
            temperatures={0: self.locked.card.temperature},
            thresholds={0: self.locked.card.thresholds},
        )
        draws = Draws.of(labelled.truth[images], labelled.patients[images], section.replicates, seed)
        return at_levels(own, section, draws)[section.headline].figures.get(headline(labelled.target.kind))

    def acquainted(self, labelled: Labelled) -> NDArray[np.str_]:
        """The patients of a task that the teacher learnt from, or had something chosen on."""
        return np.unique(labelled.patients[np.isin(hashed(labelled.patients), self.locked.card.trained_on.of)])

    def known_to(self, card: ModelCard) -> ModelCard:
        """A student's card that also names the patients and data sets its teacher learnt from: they are no test of it.

        Numbers of images and patients stay those that the student itself was trained on.
        """
        own, other = card.trained_on, self.locked.card.trained_on
        both = {name: tuple(sorted({*getattr(own, name), *getattr(other, name)})) for name in ("of", "records")}
        return card.model_copy(update={"trained_on": own.model_copy(update=both)})


def divergence(kind: Kind, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """(B,) T^2 KL(teacher || student) of (B, w) logits, both divided by T: gradients do not shrink with T."""
    student, teacher = student / temperature, teacher / temperature
    if kind in ("binary", "multiclass"):
        log_q, log_p = F.log_softmax(student, 1), F.log_softmax(teacher, 1)
        return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(1)
    yes = F.logsigmoid(teacher).exp() * (F.logsigmoid(teacher) - F.logsigmoid(student))
    no = F.logsigmoid(-teacher).exp() * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
    return temperature**2 * (yes + no).mean(1)


# ---------------------------------------------------------------------------------------------- which may teach


def teacher_digest(section: TeacherSection) -> str:
    """What names the teacher's model.

    Raises:
        UserError: there is no finished run of `miram finetune`, or the model is damaged.
    """
    run = Path(section.run)
    if (run / CARD).is_file():
        return read_card(run, CLASSIFIER, ModelCard).digest
    refuse_unfinished(run, "finetune")
    return read_card(run / "model", CLASSIFIER, ModelCard).digest


def read_teacher(
    section: FinetuneSection, shards: ShardDataset, labelled: Labelled, judged: Ints, student: Encoder
) -> Teacher:
    """The teacher that a configuration names.

    Args:
        section: what is tuned.
        shards: the data.
        labelled: the task.
        judged: (j,) numbers of all images that will be judged.
        student: the encoder as it was loaded.

    Raises:
        UserError: it is no sound model, answers another question, sees something else than the student, or learnt from
            patients who will be judged.
    """
    named = section.teacher
    assert named is not None
    locked = read_locked(named.run, named.encoder)
    size = student.patch_embed.img_size
    assert size is not None
    refuse_unlike(locked.card, section, labelled, (size[0], size[1]))
    refuse_channels(locked.card, shards)
    teacher = Teacher(locked, named.weight, named.temperature, normalisation(student))
    refuse_leak(teacher, labelled, judged)
    return teacher


def refuse_unlike(card: ModelCard, section: FinetuneSection, labelled: Labelled, size: tuple[int, int]) -> None:
    """Refuse a teacher that answers something else, or would see something else.

    Raises:
        UserError: says what.
    """
    assert section.teacher is not None
    here, there = labelled.target, card.target
    name, wide, high = section.teacher.run, card.image_size[1], card.image_size[0]
    if (there.kind, there.classes) != (here.kind, here.classes):
        raise UserError(
            f"finetune.teacher: {name} answers {there.name!r} ({there.kind}: {', '.join(there.classes)}), the task is "
            f"{here.name!r} ({here.kind}: {', '.join(here.classes)}); name a teacher with these classes in this order"
        )
    if card.input != section.input:
        raise UserError(
            f"finetune.teacher: {name} reads {card.input}, the student {section.input}; name one with the same input"
        )
    if size != tuple(card.image_size) and (section.input == "windows" or size[0] * wide != size[1] * high):
        what = "windows of another size show another part" if section.input == "windows" else "that is another shape"
        raise UserError(
            f"finetune.teacher: {name} sees {high} x {wide} pixels, the student {size[0]} x {size[1]}: {what}; "
            f"set finetune.image_size=[{high},{wide}]"
        )


def refuse_leak(teacher: Teacher, labelled: Labelled, judged: Ints) -> None:
    """Refuse a teacher that learnt from anybody who will be judged.

    Raises:
        UserError: how many there are.
    """
    patients = np.unique(labelled.patients[judged])
    if known := len(np.intersect1d(patients, teacher.acquainted(labelled))):
        raise UserError(
            f"finetune.teacher: it learnt from {known} of the {counted(len(patients), 'patient')} who will be judged, "
            "so that the figures would be no test; name a teacher that was tuned on others, or judge patients whom it "
            "does not know (another data.split, or data whose official test it was judged on)"
        )
