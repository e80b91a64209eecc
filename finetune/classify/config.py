"""Configuration of classification."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator, model_validator

from ...data.config import DataSection
from ...data.frames import AugmentSection
from ...engine.config import Section
from ...engine.recipe import TrainSection

Level = Literal["image", "breast", "patient"]
Input = Literal["whole", "windows", "tiles"]
Rate = Annotated[float, Field(gt=0, le=10)]
Part = Annotated[float, Field(gt=0, le=1)]


class TilesSection(Section):
    """High resolution: features of a frozen encoder's tiles, read by attention."""

    mm_per_pixel: PositiveFloat = 0.1
    """what the encoder sees"""
    spacing_mm: PositiveFloat | None = None
    """of the stored images, where the data does not say it"""
    overlap: float = Field(default=0.0, ge=0, lt=0.9)
    """share of a tile that its neighbour repeats"""
    tissue: float = Field(default=0.1, ge=0, le=1)
    """least part of a tile that is breast"""
    bag: Literal["breast", "image"] = "breast"
    """whose tiles are read together"""
    width: PositiveInt = 128
    """of the attention"""
    dropout: float = Field(default=0.25, ge=0, lt=1)
    """of the features while training"""
    steps: PositiveInt = 1000
    """of training, a batch of bags each"""
    batch_size: PositiveInt = 16
    """bags a step"""
    weight_decay: NonNegativeFloat = 1e-3
    """of the attention's and the head's matrices"""


class ReadoutSection(Section):
    """From images to breasts and patients."""

    views: Literal["mean", "max"] = "mean"
    """a breast's probability from its images'"""
    breasts: Literal["max", "mean"] = "max"
    """a patient's from the breasts', in tasks where more is worse; several classes are always averaged"""


class SearchSection(Section):
    """What every method may try, all the same number."""

    trials: PositiveInt = 3
    """learning rates, evenly spread over the method's range on a logarithmic scale (the probe: always five C)"""
    lrs: tuple[Rate, ...] | None = None
    """learning rates to try instead of the method's own range"""
    folds: PositiveInt = 3
    """inner folds of training patients that choose a rate, temperature and threshold; then all of them train the model.
    1: a held-out part chooses instead, and the model that it chose is the one that is judged"""
    holdout: float = Field(default=0.3, gt=0, lt=1)
    """share of the training patients that is held out where folds is 1"""

    @field_validator("lrs")
    @classmethod
    def _once(cls, lrs: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if lrs is not None and (not lrs or len(set(lrs)) < len(lrs)):
            raise ValueError(f"at least one, each once (got {list(lrs)})")
        return lrs


class TeacherSection(Section):
    """A tuned classifier whose answers are learnt from, beside the labels."""

    run: str
    """finished run of `miram finetune`, or its model folder; same task, none of the judged patients"""
    encoder: str | None = None
    """where its encoder now lies, if it was moved"""
    weight: float = Field(default=0.5, gt=0, le=1)
    """of its answers in the loss; the labels have the rest"""
    temperature: PositiveFloat = 2.0
    """that both answers are softened by"""


class FinetuneSection(Section):
    """What is tuned, for which task, and how it is judged."""

    encoder: str
    """pretraining run, encoder.safetensors, timm:NAME, another encoder's file, random (a ViT-S) or random:NAME"""
    method: str = "lora"
    """probe (logistic regression on frozen features), attention_mil (of tiles), or a tuning method (docs/tuning.md)"""
    options: dict[str, Any] = {}
    """of the method, e.g. {rank: 8}"""
    image_size: PositiveInt | tuple[PositiveInt, PositiveInt] | None = None
    """what the encoder sees; null: what it was pretrained on"""
    kind: Literal["auto", "binary", "multiclass", "ordinal", "multilabel"] = "auto"
    """of the task; auto: two classes or more, or several columns (data.task=mass,calc)"""
    classes: tuple[str, ...] | dict[str, tuple[str, ...]] | None = None
    """classes in their order, or {class: [labels]}, "*" for all others; null: every label a class"""
    separator: str = "|"
    """between the labels of one image, in a multilabel task"""
    input: Input = "whole"
    """an image fitted into one frame, windows that cover it, or tiles at a stated resolution"""
    tiles: TilesSection = TilesSection()
    augment: AugmentSection = AugmentSection()
    start: Literal["probe", "zero"] = "probe"
    """of the head: logistic regression on the encoder's features (LP-FT), or nothing"""
    balance: Literal["weights", "sampler", "none"] = "weights"
    """rare classes weigh more, come more often, or neither"""
    smoothing: float = Field(default=0.0, ge=0, lt=1)
    """of labels"""
    mixup: NonNegativeFloat = 0.0
    """alpha of mixup; off, as lesions do not mix"""
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    """largest rate of stochastic depth, growing with the block"""
    teacher: TeacherSection | None = None
    """a tuned model to learn from, too: logit distillation"""
    keep: Literal["last", "best"] = "last"
    """weights after the last step, or those of the best of ten looks at validation"""
    readout: ReadoutSection = ReadoutSection()
    search: SearchSection = SearchSection()
    fraction: Part = 1.0
    """share of the training patients whose labels are used"""
    folds: int = Field(default=5, ge=2)
    """of patients, where the data has no train and test split"""
    operating_point: Literal["youden", "sensitivity", "specificity"] = "youden"
    """where the threshold lies, chosen on inner validation"""
    operating_at: Part = 0.9
    """least sensitivity or specificity there"""
    headline: Level = "image"
    """level of the figure that leads"""
    subgroups: tuple[str, ...] = ()
    """columns or labels to report by, beside the usual ones"""
    replicates: PositiveInt = 1000
    """bootstrap samples of patients behind an interval"""
    final: bool = True
    """where folds judged: train a last model on all patients, for predict and evaluate"""
    explain: int = Field(default=4, ge=0)
    """judged images shown with a map of what counted"""
    batch_size: PositiveInt = 64
    """images judged at once"""


class SweepSection(Section):
    """`--sweep`: methods side by side."""

    methods: Annotated[tuple[str | dict[str, Any], ...], Field(min_length=1)] = ("linear", "lora", "full")
    """names, or {method: NAME, options: {…}} and other keys of the finetune section"""
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0, 1, 2)
    """of folds, label fractions, heads and batches"""
    fractions: Annotated[tuple[Part, ...], Field(min_length=1)] = (1.0,)
    """of the training patients' labels"""
    against: str = "linear"
    """the row that others are compared with"""


class FinetuneConfig(Section):
    """`miram finetune`."""

    out: str = "runs/finetune"
    """run folder"""
    seed: int = 0
    """of folds, label fractions, heads and batches"""
    data: DataSection
    finetune: FinetuneSection
    train: TrainSection
    sweep: SweepSection = SweepSection()

    @model_validator(mode="after")
    def _fits(self) -> FinetuneConfig:
        section = self.finetune
        if section.input == "tiles" and section.method != "attention_mil":
            raise ValueError("finetune.input: tiles are read by finetune.method=attention_mil")
        if section.method == "attention_mil" and section.input != "tiles":
            raise ValueError("finetune.method: attention_mil reads finetune.input=tiles")
        if section.teacher and section.method in ("probe", "attention_mil"):
            raise ValueError(f"finetune.teacher: {section.method} learns from labels alone; take a tuning method")
        if section.keep == "best" and section.search.folds > 1:
            raise ValueError("finetune.keep: best needs finetune.search.folds=1: a held-out part says which is best")
        if self.train.blr != TrainSection.model_fields["blr"].default:
            raise ValueError("train.blr: learning rates are searched; set finetune.search.lrs, one or several")
        return self
