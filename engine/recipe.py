"""How to train: the `train` section of every stage that learns."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from .config import Section
from .errors import UserError
from .profile import parse_window

Share = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]


class TrainSection(Section):
    """How to train."""

    steps: PositiveInt | None = None
    """optimizer steps; give this or epochs"""
    epochs: PositiveFloat | None = None
    """passes over the data; give this or steps"""
    batch_size: PositiveInt = 256
    """images a step, over all ranks and accumulated micro-batches"""
    micro_batch: PositiveInt | None = None
    """images a rank holds at once; null: no accumulation"""
    blr: PositiveFloat = 1.5e-4
    """base learning rate; lr = blr * batch_size / 256"""
    schedule: Literal["cosine", "constant"] = "cosine"
    """after warm-up: half a cosine down, or constant with a cooldown"""
    warmup_steps: int = Field(default=100, ge=0)
    """linear warm-up, at most all steps"""
    warmup_epochs: float | None = Field(default=None, ge=0)
    """the same in passes over the data; takes the place of warmup_steps"""
    cooldown: Share = 0.2
    """last share of the steps, in which a constant schedule falls linearly"""
    lr_floor: Share = 0.0
    """share of the peak that the learning rate ends at"""
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    """adam adds the decay to the gradient (L2), as recipes before AdamW did; sgd has no momentum"""
    layer_decay: float | None = Field(default=None, gt=0, le=1)
    """learning rate of each encoder block as a share of the block's above it; null: all alike"""
    weight_decay: float = Field(default=0.05, ge=0)
    """of matrices; vectors and biases are not decayed"""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """of Adam's averages"""
    clip_grad: PositiveFloat | None = None
    """largest gradient norm; how many steps were clipped is logged"""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """decay of a moving average of the weights, which then is what monitors see and the encoder holds"""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """autocast type; bf16 is slow on processors without it, fp16 is for cards without bf16"""
    compile: bool = False
    """torch.compile the model"""
    deterministic: bool = False
    """kernels that give the same bits every time, also on a GPU; slower"""
    parallel: Literal["auto", "ddp", "fsdp2"] = "auto"
    """several ranks: whole copies, or parameters in shards; auto is what accelerate's file asks for, else ddp"""
    log_every: PositiveInt = 10
    """steps between lines of metrics.jsonl"""
    trackers: tuple[TrackerName, ...] = ()
    """that get the same lines: tensorboard, wandb, mlflow, trackio"""
    checkpoint_every: PositiveInt = 100
    """steps between checkpoints"""
    checkpoint_minutes: PositiveFloat | None = None
    """at most this long between checkpoints, too"""
    checkpoint_async: bool = False
    """write checkpoints while training goes on; holds a copy of them in memory"""
    keep_checkpoints: PositiveInt = 2
    """newest checkpoints kept"""
    keep_every: PositiveInt | None = None
    """checkpoints of steps that are multiples of this are kept for good"""
    stall_seconds: float = Field(default=300.0, ge=1)
    """a rank that is at one thing for longer is reported"""
    profile_steps: str | None = None
    """steps whose profile is written, e.g. 10:20"""

    @field_validator("trackers", mode="before")
    @classmethod
    def _one_or_more(cls, names: object) -> object:
        return (names,) if isinstance(names, str) else tuple(names) if isinstance(names, list) else names

    @field_validator("profile_steps", mode="before")
    @classmethod
    def _text(cls, window: object) -> object:
        return str(window) if isinstance(window, int) else window

    @field_validator("profile_steps")
    @classmethod
    def _a_window(cls, text: str | None) -> str | None:
        if text is not None:
            parse_window(text)
        return text

    @model_validator(mode="after")
    def _one_length(self) -> TrainSection:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("set exactly one of steps and epochs")
        return self


def split_batch(section: TrainSection, world: int) -> tuple[int, int]:
    """(micro-batch of a rank, micro-batches a step).

    Raises:
        UserError: the global batch does not divide.
    """
    if section.micro_batch is None and section.batch_size % world:
        raise UserError(f"train.batch_size={section.batch_size} is no multiple of {world} ranks; change it")
    micro_batch = section.micro_batch or section.batch_size // world
    if section.batch_size % (world * micro_batch):
        raise UserError(
            f"train.batch_size={section.batch_size} is no multiple of {world} ranks x micro-batches of {micro_batch}; "
            "change train.batch_size or train.micro_batch"
        )
    return micro_batch, section.batch_size // (world * micro_batch)


def lengths(section: TrainSection, batches_per_epoch: int) -> tuple[int, int]:
    """(steps, warm-up steps) of a training."""
    steps = section.steps or max(1, round((section.epochs or 0) * batches_per_epoch))
    if section.warmup_epochs is not None:
        return steps, round(section.warmup_epochs * batches_per_epoch)
    return steps, section.warmup_steps
