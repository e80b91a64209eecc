"""How an encoder is judged: frozen tokens of every square, a linear and an attentive probe on either label.

    CELL/judged.json    per "TASK/PROBE": value, (R,) bootstrap samples, C of the linear probe's folds

Legend: n images, N tokens with the class token, D channels, R bootstrap samples.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from miram.data.shards import ShardDataset
from miram.data.views import windows
from miram.engine.files import write_json
from miram.engine.launch import device
from miram.engine.metrics import Floats, bootstrap_scores, patient_bootstrap, score
from miram.finetune.probes.attentive import fit_attentive
from miram.finetune.probes.linear import fit_linear
from miram.finetune.task import Fold, Task, grouped_folds, read_task
from miram.pretrain.encoder import Encoder, normalisation

Tokens = NDArray[np.float32]  # (n, N, D)

JUDGED = "miram.experiment.judged/1"
TASKS, PROBES = ("calc", "margin"), ("linear", "attentive")
C_GRID = (0.001, 0.01, 0.1, 1.0)
FOLDS, INNER, REPLICATES, SEED = 2, 3, 500, 0


def judge_encoder(vit: Encoder, shards: ShardDataset, out: Path) -> None:
    """Write what both probes make of the encoder on both tasks; patients and bootstrap samples are always the same."""
    tokens = tokens_of(vit, shards)
    judged: dict[str, object] = {}
    for name in TASKS:
        task = read_task(shards, name)
        splits = list(grouped_folds(task.truth, task.patients, FOLDS, SEED, task))
        weights = patient_bootstrap(task.truth, task.patients, REPLICATES, SEED)
        of_task = tokens[task.chosen]
        linear, chosen = by_linear(of_task, task, splits)
        for probe, p in (("linear", linear), ("attentive", by_attentive(of_task, task, splits))):
            samples = bootstrap_scores(task.metric, task.truth, p, weights)
            judged[f"{name}/{probe}"] = {
                "value": score(task.metric, task.truth, p),
                "samples": samples.tolist(),
                "c": chosen if probe == "linear" else None,
            }
    write_json(out, JUDGED, judged)


@torch.inference_mode()
def tokens_of(vit: Encoder, shards: ShardDataset, batch: int = 64) -> Tokens:
    """(n, N, D) tokens of every square at the encoder's own size; a square gives one window."""
    normalise, on = normalisation(vit), device()
    vit = vit.eval().to(on)
    size = vit.patch_embed.img_size
    assert size is not None
    parts = []
    for start in range(0, len(shards), batch):
        of = [windows(shards[i], size, normalise) for i in range(start, min(start + batch, len(shards)))]
        parts.append(vit.forward_features(torch.cat(of).to(on)).float().cpu().numpy())
    return np.concatenate(parts)


def by_linear(tokens: Tokens, task: Task, splits: list[Fold]) -> tuple[Floats, list[float]]:
    """(n, 2) probabilities from class token and mean patch token together, each image judged out of fold; and C."""
    features = np.concatenate([tokens[:, 0], tokens[:, 1:].mean(1)], axis=1)
    probabilities, chosen = np.empty((len(tokens), len(task.classes))), []
    for fit, rest in splits:
        search = fit_linear(features[fit], task, fit, C_GRID, INNER, SEED)
        probabilities[rest] = search.predict_proba(features[rest])
        chosen.append(float(search.best_params_["logisticregression__C"]))
    return probabilities, chosen


def by_attentive(tokens: Tokens, task: Task, splits: list[Fold]) -> Floats:
    """(n, 2) probabilities, each image judged out of fold."""
    probabilities = np.empty((len(tokens), len(task.classes)))
    for fit, rest in splits:
        probabilities[rest] = fit_attentive(tokens[fit], task.truth[fit], seed=SEED).predict(tokens[rest])
    return probabilities
