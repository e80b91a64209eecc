"""Configuration of segmentation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from ...data.config import DataSection
from ...data.frames import AugmentSection
from ...data.masks import IGNORED_NAME
from ...engine.config import Section
from ...engine.recipe import TrainSection

Value = Annotated[int, Field(ge=0, le=255)]
Part = Annotated[float, Field(gt=0, lt=1)]


class SegmentSection(Section):
    """What is segmented by which model, what it sees of an image, and how it is judged."""

    model: str = "light"
    """light, linear or unetr (decoders on an encoder), mdsa_unet or unet (networks of their own)"""
    model_options: dict[str, Any] = {}
    """of the model, e.g. {width: 64}"""
    encoder: str | None = None
    """pretraining run, encoder.safetensors, timm:NAME, another encoder's file, random (a ViT-S) or random:NAME; null:
    none, as mdsa_unet and unet want it"""
    method: str = "lora"
    """how the encoder learns: frozen, full, or a tuning method (docs/tuning.md)"""
    options: dict[str, Any] = {}
    """of the method, e.g. {rank: 8}"""
    control: Literal["untrained", "zeroed"] | None = None
    """what the encoder's pretraining, or the encoder, is worth: one of the same shape with random weights, or zeros for
    what it sees"""
    image_size: PositiveInt | tuple[PositiveInt, PositiveInt] | None = None
    """of a tile; null: what the encoder was pretrained on, 256 for mdsa_unet and unet"""
    mm_per_pixel: PositiveFloat | None = None
    """resolution that tiles are cut at; null: as stored, or by long_side"""
    long_side: PositiveInt | None = None
    """pixels along an image's longer side, where spacings are unknown; as long as a tile: the image is one tile"""
    classes: dict[str, tuple[Value, ...]] | None = None
    """of masks that hold classes: {name: [values]}, background first, `ignored` for values that count for nothing;
    null: every value a class"""
    task: Literal["auto", "lesions", "tissues"] = "auto"
    """lesions are rare, counted one by one and said from a probability on; tissues fill the image; auto: lesions where
    masks hold findings, or classes of which less than a twentieth of the pixels is any but background"""
    lesion: Literal["auto", "finding", "part"] = "auto"
    """what counts as one: a numbered finding, be it in several parts, or every connected part; auto: a part where no
    mask of the data numbers more than one finding, and of classes"""
    unmasked: Literal["auto", "negative", "left_out"] = "auto"
    """images without a mask: nothing is there, or nobody looked; auto: the former where masks hold lesions"""
    loss: Literal["ce", "focal"] = "ce"
    """of pixels; beside it stands Dice, image by image"""
    dice: NonNegativeFloat = 1.0
    """weight of the Dice loss"""
    foreground: float = Field(default=0.5, gt=0, le=0.5)
    """share of the training crops that are centred on something; the others hold nothing, where that can be had"""
    augment: AugmentSection = AugmentSection()
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    """largest rate of the encoder's stochastic depth, growing with the block"""
    threshold: Part | None = None
    """probability from which on a lesion is said; null: chosen on held-out training patients. Of tissues, the likeliest
    is said"""
    holdout: Part = 0.2
    """share of the training patients that choose the threshold, where there is no official val"""
    smallest: NonNegativeInt = 0
    """what is said in fewer connected pixels of the stored image is not said"""
    overlap: float = Field(default=0.5, ge=0, lt=1)
    """of neighbouring tiles, when an image is judged"""
    flip_average: bool = True
    """judge each tile upside down, too, and mirrored where the data does not fix the side of the chest wall; as far as
    training crops were"""
    batch_size: PositiveInt = 8
    """tiles judged at once"""
    folds: int = Field(default=5, ge=2)
    """of patients, where the data has no train and test split"""
    hit_iou: Part = 0.1
    """overlap with a lesion from which on a mark hits it"""
    tolerance_mm: PositiveFloat = 1.0
    """of surface Dice, where the spacing is known"""
    tolerance_px: PositiveFloat = 5.0
    """of surface Dice, where it is not"""
    replicates: PositiveInt = 1000
    """bootstrap samples of patients behind an interval"""
    final: bool = True
    """where folds judged: train a last model on all patients, for predict"""

    @field_validator("classes")
    @classmethod
    def _each_value_once(cls, classes: dict[str, tuple[int, ...]] | None) -> dict[str, tuple[int, ...]] | None:
        if classes is None:
            return None
        values = [value for of in classes.values() for value in of]
        if len(values) > len(set(values)) or not all(classes.values()):
            raise ValueError(f"every class needs values, and no value is in two (got {classes})")
        if len(classes.keys() - {IGNORED_NAME}) < 2:
            raise ValueError(f"background and at least one more (got {[*classes]})")
        if next(iter(classes)) == IGNORED_NAME:
            raise ValueError(f"background comes first, {IGNORED_NAME!r} behind it")
        return classes

    @model_validator(mode="after")
    def _one_resolution(self) -> SegmentSection:
        if self.augment.area != AugmentSection.model_fields["area"].default:
            raise ValueError("augment.area: the resolution says how large tissue is; leave it out")
        if self.mm_per_pixel is not None and self.long_side is not None:
            raise ValueError("mm_per_pixel and long_side both say how large a pixel is; set one of them")
        return self


class SegmentSweepSection(Section):
    """`--sweep`: models side by side."""

    models: Annotated[dict[str, dict[str, Any]], Field(min_length=1)] = {
        "light": {"model": "light"},
        "light, untrained encoder": {"model": "light", "control": "untrained"},
        "light, no encoder": {"model": "light", "control": "zeroed"},
        "mdsa_unet": {"model": "mdsa_unet", "encoder": None},
        "unet": {"model": "unet", "encoder": None},
    }
    """{name: what differs from the segment section}"""
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0, 1, 2)
    """of folds, weights and crops"""
    against: str = "light"
    """the row that others are compared with"""


class SegmentConfig(Section):
    """`miram segment`."""

    out: str = "runs/segment"
    """run folder"""
    seed: int = 0
    """of folds, weights and crops"""
    data: DataSection
    segment: SegmentSection
    train: TrainSection
    sweep: SegmentSweepSection = SegmentSweepSection()
