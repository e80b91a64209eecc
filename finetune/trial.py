"""What is judged and how: encoders that stand in a table, and what is the same for all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from ..data.opening import open_shards
from ..data.shards import ShardDataset
from ..engine.errors import UserError
from ..engine.metrics import Estimate, Floats, bootstrap_scores, patient_bootstrap, score
from ..engine.seeding import stable_seed
from ..pretrain.encoder import Encoder
from ..pretrain.weights.loading import random_like, read_encoder
from .config import Method, ProbeConfig, ProbeSection
from .features import Reading, cached_features
from .probes import PROBES
from .task import Fold, Judgement, Task, fold_scores, grouped_folds, outer_folds, read_task


@dataclass(frozen=True)
class Contestant:
    """An encoder that stands in every table: the one asked about, one beside it, or a control with random weights."""

    name: str
    source: str
    role: Literal["first", "beside", "control"]
    seed: int = 0

    def read(self, channels: int) -> tuple[Encoder, list[str]]:
        """The encoder for data of so many channels, and what became of every key of its file."""
        if self.role == "control":
            return random_like(self.source, self.seed, channels=channels), []
        return read_encoder(self.source, channels=channels)


@dataclass(frozen=True)
class Probed:
    """What one method makes of one encoder: judgement, figure, and the figure's bootstrap samples."""

    method: Method
    encoder: Contestant
    judgement: Judgement
    value: float
    samples: Floats
    folds: list[float]
    keys: list[str]  # what became of every key of the encoder's file
    parameters: int  # of the encoder

    @property
    def estimate(self) -> Estimate:
        """The figure with its interval."""
        return Estimate.of(self.value, self.samples)


def contestants(settings: ProbeConfig) -> list[Contestant]:
    """The encoder, those beside it, then its controls with random weights."""
    section = settings.probe
    untrained = section.encoder.partition(":")[0] == "random"
    first = Contestant("untrained" if untrained else "pretrained", section.encoder, "first")
    names = short(section.beside, {first.name, "random", *(f"random {i}" for i in range(1, section.controls + 1))})
    beside = [Contestant(name, source, "beside") for name, source in zip(names, section.beside, strict=True)]
    seeds = [stable_seed(settings.seed, "control", i) % 2**63 for i in range(section.controls)]
    return [first, *beside, *(Contestant(f"random {i}", section.encoder, "control", s) for i, s in enumerate(seeds, 1))]


def short(sources: Sequence[str], taken: set[str]) -> Sequence[str]:
    """Names for tables: of a file or run the last parts of its path, as many as tell them all apart."""
    paths = [Path(s).parent if s.endswith("encoder.safetensors") else Path(s) for s in sources]
    for parts in range(1, 1 + max((len(p.parts) for p in paths), default=0)):
        tails = ["/".join(path.parts[-parts:]) for path in paths]
        names = [tail if Path(s).exists() else s for s, tail in zip(sources, tails, strict=True)]
        if len({*names, *taken}) == len(names) + len(taken):
            return names
    return [f"beside {i}: {source}" for i, source in enumerate(sources, 1)]


@dataclass(frozen=True)
class Trial:
    """What is the same for every encoder and method: images, task, folds, bootstrap samples."""

    settings: ProbeConfig
    shards: ShardDataset
    task: Task
    splits: list[Fold]
    split_name: str

    @classmethod
    def of(cls, settings: ProbeConfig) -> Trial:
        """Read data and task.

        Raises:
            UserError: the data has no such task, or too few patients for the folds.
        """
        shards = open_shards(settings.data)
        task = read_task(shards, settings.data.task)
        splits, name = outer_folds(task, settings.probe.folds, settings.seed)
        for fit, _ in splits:
            inner = settings.probe.inner_folds
            list(grouped_folds(task.truth[fit], task.patients[fit], inner, settings.seed, task, "probe.inner_folds"))
        return cls(settings, shards, task, splits, name)

    @cached_property
    def weights(self) -> Floats:
        """(R, m) bootstrap samples of the judged images."""
        judged = np.concatenate([rest for _, rest in self.splits])
        section = self.settings.probe
        return patient_bootstrap(
            self.task.truth[judged], self.task.patients[judged], section.replicates, self.settings.seed
        )

    def check(self, encoder: Contestant) -> None:
        """Refuse what would only be found out after hours.

        Raises:
            UserError: the encoder is not there, or has not what is to be read off it.
        """
        vit, _ = encoder.read(self.shards.channels)
        try:
            reading(suited(self.settings.probe, vit), self.settings.seed).check(vit)
        except UserError as error:
            raise UserError(f"encoder {encoder.source}: {error}") from error

    def probe(self, encoder: Contestant, cache: Path) -> Iterator[Probed]:
        """Features of one encoder, then every method's judgement and figure."""
        vit, keys = encoder.read(self.shards.channels)
        section = suited(self.settings.probe, vit)
        asked = reading(section, self.settings.seed)
        features = cached_features(vit, self.shards, asked, section.batch_size, cache, encoder.name)
        for method in section.methods:
            judgement = PROBES[method](features, self.task, self.splits, section, self.settings.seed)
            truth = self.task.truth[judgement.images]
            samples = bootstrap_scores(self.task.metric, truth, judgement.probabilities, self.weights, judgement.fold)
            value = score(self.task.metric, truth, judgement.probabilities, groups=judgement.fold)
            folds, parameters = fold_scores(self.task, judgement), sum(p.numel() for p in vit.parameters())
            yield Probed(method, encoder, judgement, value, samples, folds, keys, parameters)


def suited(section: ProbeSection, vit: Encoder) -> ProbeSection:
    """The settings for this encoder: of the sweep's poolings those it has, as not every ViT has a class token."""
    pools = section.pools if vit.cls_token is not None else tuple(p for p in section.pools if p == "mean")
    return section.model_copy(update={"pools": pools or ("mean",)})


def reading(section: ProbeSection, seed: int) -> Reading:
    """What the methods need to know of an image: the last block for all, more of it for the sweep and attention."""
    sweep = "sweep" in section.methods
    return Reading(
        layers=tuple(dict.fromkeys((-1, *(section.layers if sweep else ())))),
        pools=tuple(dict.fromkeys((section.pool, *(section.pools if sweep else ())))),
        crops=section.crops if sweep or "mae_linear" in section.methods else 0,
        tokens="attentive" in section.methods,
        seed=seed,
    )
