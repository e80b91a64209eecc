"""Attention over the tiles of a breast (multiple-instance learning): which of them count, and what they say together.

With x the standardised features of a bag's tiles (Ilse, Tomczak and Welling 2018, eqs. 8 and 9):

    attention = softmax over tiles of  score(tanh(content(x)) * sigmoid(gate(x)))
    logits    = head(sum over tiles of attention * x)

A bag is a breast, all tiles of all its views, or one image. Bags are read from disk when they are needed.

FILE.safetensors   mean, deviation (D,); content, gate (L, D), score (1, L), head (w, D) and their biases; float32.
                   metadata {"miram": JSON {"schema": "miram.mil/1", "bag": "breast" or "image"}}

Legend: B bags, T tiles, D features, L width of the attention, w logits, j images asked about.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ...engine.errors import RunFailed, UserError, one_line
from ...engine.files import write_atomic
from ...engine.launch import device
from ...engine.metrics import Floats, Ints
from ...engine.schedule import warmup_cosine
from ...engine.seeding import generator, stable_seed
from ..probes.attentive import padded
from .config import FinetuneSection
from .labels import Labelled
from .units import joined_truth

SCHEMA = "miram.mil/1"
RATES = (3e-4, 1e-2)  # learning rates worth trying; see tests/finetune/classify/test_mil.py

Bag = Literal["breast", "image"]
Rows = NDArray[np.float32]


class Tiles(Protocol):
    """The (T, D) tiles of a data set's images, as `TileFeatures` has them."""

    @property
    def dim(self) -> int:
        """D."""

    def tiles(self, i: int) -> Rows:
        """(T, D) of the data set's row i."""


@dataclass(frozen=True)
class Bags:
    """(T, D) of each bag: the tiles of all its images, read when asked for."""

    features: Tiles
    rows: Sequence[Ints]  # of the data set, of each bag

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int, /) -> Rows:
        return np.concatenate([self.features.tiles(int(row)) for row in self.rows[i]])


class GatedAttention(nn.Module):
    """Weigh tiles of `dim` features and classify their weighted mean; before training all bags give zero."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, dim: int, width: int, outputs: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("deviation", torch.ones(dim))
        self.content, self.gate = nn.Linear(dim, width), nn.Linear(dim, width)
        self.score = nn.Linear(width, 1, bias=False)
        self.head = nn.Linear(dim, outputs)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(
        self, tiles: Tensor, padding: Tensor | None = None, kept: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits and attention, which sums to 1: of a bag (T, D) -> (w,), (T,); of several (B, T, D) -> (B, w), (B, T).

        Args:
            tiles: features as the encoder gives them.
            padding: (B, T) true where there is no tile.
            kept: (B, 1, D) what dropout makes of each feature: 0, or more than 1.
        """
        x = (tiles - self.mean) / self.deviation
        if kept is not None:
            x = x * kept
        scores = self.score(self.content(x).tanh() * self.gate(x).sigmoid()).squeeze(-1)
        if padding is not None:
            scores = scores.masked_fill(padding, -torch.inf)
        attention = scores.softmax(-1)
        return self.head((attention.unsqueeze(-2) @ x).squeeze(-2)), attention


@dataclass(frozen=True)
class MilModel:
    """A trained attention, and what its bags are."""

    net: GatedAttention
    bag: Bag

    @torch.inference_mode()
    def judge(self, tiles: Rows) -> tuple[Floats, Floats]:
        """(w,) logits and (T,) attention of a bag's (T, D) tiles, in float64."""
        logits, attention = self.net(torch.from_numpy(np.ascontiguousarray(tiles)).to(self.net.mean.device))
        return logits.double().cpu().numpy(), attention.double().cpu().numpy()

    def write(self, path: Path) -> None:
        """Write the model; the same model gives the same bytes."""
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.net.state_dict().items()}
        write_atomic(path, save(tensors, {"miram": json.dumps({"schema": SCHEMA, "bag": self.bag})}))

    @classmethod
    def read(cls, path: Path) -> MilModel:
        """Read what `write` wrote.

        Raises:
            UserError: the file is missing, damaged, or another model's.
        """
        try:
            with safe_open(path, "pt") as file:
                said = json.loads((file.metadata() or {}).get("miram", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
            if said.get("schema") != SCHEMA or said.get("bag") not in ("breast", "image"):
                raise ValueError(f"it is no {SCHEMA}")
            (width, dim), outputs = tensors["content.weight"].shape, len(tensors["head.bias"])
            net = GatedAttention(dim, width, outputs)
            net.load_state_dict(tensors)
            if not all(tensor.isfinite().all() for tensor in tensors.values()):
                raise ValueError("it holds numbers that are not finite")
        except (SafetensorError, OSError, KeyError, ValueError, RuntimeError, AttributeError, TypeError) as error:
            raise UserError(f"{path} cannot be read as attention over tiles: {one_line(str(error))}") from error
        return cls(net.eval(), said["bag"])


# ---------------------------------------------------------------------------------------------- asking


def logits(model: MilModel, features: Tiles, labelled: Labelled, images: Ints) -> Floats:
    """(j, w) float64 logits of labelled images. Those of a breast have the same, whichever of them are asked for."""
    members, of = grouped(names_of(labelled, model.bag))
    asked, place = np.unique(of[images], return_inverse=True)
    bags = Bags(features, [labelled.rows[members[bag]] for bag in asked])
    return np.stack([model.judge(bags[i])[0] for i in range(len(bags))])[place]


def attention(model: MilModel, features: Tiles, labelled: Labelled, image: int) -> Floats:
    """(T,) attention that the image's tiles get; over all images of its bag it sums to 1."""
    members, of = grouped(names_of(labelled, model.bag))
    rows = labelled.rows[members[of[image]]]
    tiles = [features.tiles(int(row)) for row in rows]
    ends = np.cumsum([len(part) for part in tiles])[:-1]
    shares = np.split(model.judge(np.concatenate(tiles))[1], ends)
    return shares[int(np.flatnonzero(rows == labelled.rows[image])[0])]


def names_of(labelled: Labelled, bag: Bag) -> NDArray[np.str_]:
    """(n,) the name of each labelled image's bag."""
    return labelled.breasts if bag == "breast" else labelled.keys


def grouped(names: NDArray[np.str_]) -> tuple[list[Ints], Ints]:
    """The numbers of equal names, and of each name which group it is in."""
    _, of = np.unique(names, return_inverse=True)
    return np.split(np.argsort(of, kind="stable"), np.cumsum(np.bincount(of))[:-1]), of


# ---------------------------------------------------------------------------------------------- training


def fit(features: Tiles, labelled: Labelled, images: Ints, settings: FinetuneSection, lr: float, seed: int) -> MilModel:
    """Train on labelled images; the same arguments give the same model, up to rounding on other machines.

    A breast is what its worst view is; of several classes without an order, breasts whose views disagree teach nothing.

    Args:
        features: tiles of the data set's images.
        labelled: the task.
        images: numbers of those to learn from, no others are looked at.
        settings: of the attention, of balance and smoothing.
        lr: the highest learning rate, at the start.
        seed: of the start, the order of bags, and dropout.

    Raises:
        RunFailed: the weights are not finite any more.
    """
    section, target = settings.tiles, labelled.target
    members, of = grouped(names_of(labelled, section.bag)[images])
    truth, agree = joined_truth(target.kind, labelled.truth[images], of)
    bags = Bags(features, [labelled.rows[images[members[i]]] for i in np.flatnonzero(agree)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stable_seed(seed, "mil") % 2**63)
        net = GatedAttention(features.dim, section.width, target.width)
    for buffer, value in zip((net.mean, net.deviation), moments(bags), strict=True):
        buffer.copy_(torch.from_numpy(value))
    descend(net.to(device()), bags, truth[agree], labelled, settings, lr, seed)
    if not all(parameter.isfinite().all() for parameter in net.parameters()):
        raise RunFailed(f"attention over tiles diverged at learning rate {lr:g}; leave it out of finetune.search.lrs")
    return MilModel(net.eval(), section.bag)


def descend(
    net: GatedAttention, bags: Bags, truth: Ints, labelled: Labelled, settings: FinetuneSection, lr: float, seed: int
) -> None:
    """AdamW with a cosine; matrices decay.

    Dropout hides a feature from all tiles of a bag: hidden tile by tile, the mean over many would hardly change.
    """
    section, target, on = settings.tiles, labelled.target, net.mean.device
    matrices = [p for p in net.parameters() if p.ndim > 1]
    biases = [p for p in net.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": section.weight_decay}, {"params": biases, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    weights = target.class_weights(truth).to(on) if settings.balance == "weights" else None
    answers = torch.from_numpy(truth).to(on)
    rng = torch.Generator().manual_seed(stable_seed(seed, "mil dropout") % 2**63)
    strata = strata_of(truth) if settings.balance == "sampler" else None
    for step, chosen in zip(range(section.steps), draws(len(bags), section.batch_size, strata, seed), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = warmup_cosine(step, section.steps, 0, lr)
        kept = (torch.rand(len(chosen), 1, net.mean.numel(), generator=rng) >= section.dropout).float().to(on)
        tiles, padding = padded(bags, torch.from_numpy(chosen), on)
        said, _ = net(tiles, padding, kept / (1 - section.dropout))
        loss = target.loss(said, answers[chosen], weights, settings.smoothing).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def moments(bags: Bags) -> tuple[Floats, Floats]:
    """(D,) mean and deviation of all tiles, bag after bag, twice: a deviation about the mean loses no digits."""
    total = sum(bags[i].sum(0, dtype=np.float64) for i in range(len(bags)))
    count = sum(len(bags[i]) for i in range(len(bags)))
    mean: Floats = np.asarray(total) / count
    squares = sum(((bags[i] - mean) ** 2).sum(0) for i in range(len(bags)))
    deviation = np.sqrt(np.asarray(squares) / count)
    return mean, np.where(deviation > 1e-6, deviation, 1.0)


def strata_of(truth: Ints) -> Ints:
    """(n,) the class that a bag is drawn for; with several labels the rarest it has, or that it has none."""
    if truth.ndim == 1:
        return truth
    rarest = np.argsort(truth.sum(0), kind="stable")
    ranked = np.column_stack([truth[:, rarest], np.ones(len(truth), truth.dtype)])
    return np.asarray(ranked.argmax(1))


def draws(n: int, size: int, strata: Ints | None, seed: int) -> Iterator[Ints]:
    """Numbers of the bags of each step: all in turn, in another order every time; or each stratum equally often."""
    size = min(size, n)
    if strata is not None:
        _, of = np.unique(strata, return_inverse=True)
        share = 1 / np.bincount(of)[of]
        rng = generator(seed, "mil bags")
        while True:
            yield rng.choice(n, size, p=share / share.sum())
    epoch, waiting = 0, np.zeros(0, np.int64)
    while True:
        while len(waiting) < size:
            waiting, epoch = np.append(waiting, generator(seed, epoch, "mil bags").permutation(n)), epoch + 1
        yield waiting[:size]
        waiting = waiting[size:]
