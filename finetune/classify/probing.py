"""Logistic regression on frozen features: what any tuning has to beat, and often with few labels does not.

The model is the plain encoder with a linear head, for every kind of task.

Legend: N labelled images, j of them, D features, w outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ...data.frames import TrainFrames
from ...engine.metrics import Floats, Ints
from ...engine.seeding import stable_seed
from ...engine.tensors import read_tensors
from ...pretrain.encoder import normalisation
from ..columns import Columns
from ..features import digest, make_once
from ..peft import apply
from ..peft.base import Tuned
from .bench import Bench, judge
from .head import StandardisedLinear, solve
from .reading import mean_logits
from .scores import headline_score
from .search import Candidate, choose, inner_folds

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # C, inverse strengths of regularisation
FORM = "miram.frames/1"


@dataclass
class Probing:
    """A linear head on features that are computed once."""

    bench: Bench
    _best: dict[bytes, float] = field(default_factory=dict, init=False, repr=False)
    knob = "C"

    @property
    def values(self) -> tuple[float, ...]:
        """The strengths that are tried, the strongest regularisation first: a solution takes no time."""
        return STRENGTHS

    @cached_property
    def features(self) -> Floats:
        """(N, D) of all labelled images: the encoder's read-out, averaged over an image's frames."""
        bench, section = self.bench, self.bench.section
        read = {"form": FORM, "input": section.input, "rows": bench.labelled.rows.tolist()}
        path = bench.cache / f"{digest(bench.encoder, bench.shards, read)}.safetensors"

        def fill(columns: Columns) -> None:
            found = judge(bench, self.headless(), np.arange(len(bench.labelled.rows)))
            columns.add("features", torch.from_numpy(found))

        make_once(path, {"name": section.encoder, "input": section.input}, fill)
        return np.asarray(read_tensors(path)["features"].numpy(), np.float64)

    @cached_property
    def augmented(self) -> Floats:
        """(N, D) the same of one training view of each image: how far augmentation moves features."""
        bench, section = self.bench, self.bench.section
        vit, seed = bench.encoder, stable_seed(bench.settings.seed, "start") % 2**63
        size = vit.patch_embed.img_size
        assert size is not None
        assert section.input != "tiles"
        draw = TrainFrames(size, section.input, section.augment, normalisation(vit), seed)
        pictures = (cast(Tensor, draw(bench.shards[int(row)], 0)["image"])[None] for row in bench.labelled.rows)
        return mean_logits(self.headless(), pictures, len(bench.labelled.rows), section.batch_size)

    def headless(self) -> Tuned:
        """The frozen encoder."""
        return apply(deepcopy(self.bench.encoder), "linear").eval()

    def make(self, images: Ints, value: float, place: Path, seed: int, held: Ints | None = None) -> Tuned:
        """Solve for the head."""
        tuned = self.headless()
        tuned.head = self.solved(images, value).plain().to(next(tuned.model.parameters()))
        return tuned

    def solved(self, images: Ints, c: float, *, views: bool = False) -> StandardisedLinear:
        """The head of some images, in float64; with `views` of a training view of each, too."""
        labelled, section = self.bench.labelled, self.bench.section
        truth, x = labelled.truth[images], self.features[images]
        if views:
            truth, x = np.concatenate([truth, truth]), np.concatenate([x, self.augmented[images]])
        weights = None if section.balance == "none" else labelled.target.class_weights(truth).double()
        head = StandardisedLinear.of(x, labelled.target.width)
        solve(head, torch.from_numpy(x), torch.from_numpy(truth), labelled.target, weights, section.smoothing, c)
        return head

    def start(self, images: Ints) -> StandardisedLinear:
        """What tuning starts from: the head of images and training views of them, at the best strength on inner folds.

        Of the images alone it would be wrong about the views it is then trained on, and the first steps would undo it.
        """
        key = images.tobytes()
        if key not in self._best:
            pairs, _ = inner_folds(self.bench, images)
            tried = [Candidate(c, tuple(self.score(c, *pair) for pair in pairs)) for c in STRENGTHS]
            self._best[key] = STRENGTHS[choose(tried)]
        return self.solved(images, self._best[key], views=True)

    def score(self, c: float, known: Ints, held: Ints) -> float:
        """The leading metric on held images of a head that knows others."""
        said = self.solved(known, c, views=True)(torch.from_numpy(self.features[held])).detach().numpy()
        return headline_score(self.bench.labelled, held, np.asarray(said, np.float64))

    def logits(self, model: Tuned, images: Ints) -> Floats:
        """(j, w) of labelled images, from the features that are there."""
        with torch.inference_mode():
            head = deepcopy(model.head).cpu().double()
            return np.asarray(head(torch.from_numpy(self.features[images])).numpy(), np.float64)

    def cost(self, model: Tuned) -> Mapping[str, Any]:
        """A head."""
        written = sum(tensor.numel() * tensor.element_size() for tensor in model.head.state_dict().values())
        return {"trainable": 0, "head": model.head_parameters, "adapter_bytes": written}
