"""The probe stage: an encoder and a labelled data set in, figures with intervals out."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..data.opening import open_shards
from ..data.shards import ShardDataset
from ..engine.config import load
from ..engine.files import read_json, write_atomic
from ..engine.metrics import Estimate, Floats, bootstrap_scores, chance, patient_bootstrap, score
from ..engine.run import RESULT, Run, open_run
from ..engine.seeding import stable_seed
from ..pretrain.encoder import Encoder, encoder_digest, load_encoder, random_like, read_provenance
from .config import ProbeConfig
from .features import cached_features
from .figures import CAPTION, draw_probe
from .linear import Fold, Judgement, Task, fold_scores, judge, outer_folds, read_task


@dataclass(frozen=True)
class Probed:
    """One encoder's judgement, its figure and the figure's bootstrap samples."""

    name: str
    judgement: Judgement
    value: float
    samples: Floats
    folds: list[float]

    @property
    def estimate(self) -> Estimate:
        """The figure with its interval."""
        return Estimate.of(self.value, self.samples)


def probe(config: str, arguments: Sequence[str] = ()) -> Run:
    """`miram probe CONFIG --a.b=value …`.

    Raises:
        UserError: configuration, encoder, data or run folder are not usable.
    """
    settings = load(ProbeConfig, config, arguments)
    trial = Trial.of(settings)
    encoders = list(named_encoders(settings))
    inputs = trial.shards.inputs | {"encoder": encoder_digest(settings.probe.encoder)}
    run = open_run(settings, settings.out, "probe", inputs)
    if run.finished:
        print(f"{run.folder} is finished; nothing to do")
        say(read_json(run.folder / "result.json", RESULT))
        return run
    with run.recorded():
        probed = [trial.probe(name, vit, run.folder.parent / "features") for name, vit in encoders]
        write_result(run, trial, probed)
        write_predictions(run, trial, probed[0].judgement)
        figure = run.caption({"probe.png": CAPTION}) / "probe.png"
        draw_probe(figure, trial.task, [(p.name, p.judgement, p.folds) for p in probed])
    say(read_json(run.folder / "result.json", RESULT))
    return run


def named_encoders(settings: ProbeConfig) -> Iterator[tuple[str, Encoder]]:
    """The encoder, then its controls with random weights."""
    yield "pretrained", load_encoder(settings.probe.encoder)
    for i in range(settings.probe.controls):
        seed = stable_seed(settings.seed, "control", i) % 2**63
        yield f"random {i + 1}", random_like(settings.probe.encoder, seed)


@dataclass(frozen=True)
class Trial:
    """What is the same for every encoder: images, task, folds, C grid, bootstrap samples."""

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
        return cls(settings, shards, task, *outer_folds(task, settings.probe.folds, settings.seed))

    def probe(self, name: str, vit: Encoder, cache: Path) -> Probed:
        """Features, judgement and figure of one encoder."""
        section, task, seed = self.settings.probe, self.task, self.settings.seed
        features = cached_features(vit, self.shards, section.pool, section.batch_size, cache, name)
        judgement = judge(features[task.chosen], task, self.splits, section.c_grid, section.inner_folds, seed)
        truth, patients = task.truth[judgement.images], task.patients[judgement.images]
        weights = patient_bootstrap(truth, patients, section.replicates, seed)
        samples = bootstrap_scores(task.metric, truth, judgement.probabilities, weights)
        value = score(task.metric, truth, judgement.probabilities)
        return Probed(name, judgement, value, samples, fold_scores(task, judgement))


def write_result(run: Run, trial: Trial, probed: list[Probed]) -> None:
    """result.json: the encoder's figure first, then every other row, then differences on the same bootstrap samples."""
    first, controls, task, split = probed[0], probed[1:], trial.task, trial.settings.data.split
    judged = first.judgement.images
    run.result(
        {
            "task": task.name,
            "split": trial.split_name + (f", within split {split!r}" if split in task.splits else ""),
            "metric": task.metric,
            "value": first.value,
            "interval": first.estimate.interval,
            "n_images": len(judged),
            "n_patients": len(np.unique(task.patients[judged])),
            "classes": {name: int((task.truth[judged] == k).sum()) for k, name in enumerate(task.classes)},
            "rows": list(rows(task, first, controls)),
            "differences": list(differences(first, controls)),
            "notes": notes(trial, task.chosen[judged].tolist()),
        }
    )


def rows(task: Task, first: Probed, controls: list[Probed]) -> Iterator[dict[str, object]]:
    """Every encoder, the controls' mean, and the majority class."""
    for p in (first, *controls):
        detail = (
            f"C {', '.join(f'{c:g}' for c in p.judgement.chosen_c)}; folds {', '.join(f'{v:.3f}' for v in p.folds)}"
        )
        name = f"{p.name} encoder" if p is first else f"{p.name} weights"
        yield {"name": name, "value": p.value, "interval": p.estimate.interval, "detail": detail}
    if controls:
        mean = mean_of(controls)
        yield {"name": f"mean of {len(controls)} random", "value": mean.value, "interval": mean.interval}
    yield {"name": "majority class", "value": chance(task.metric, len(task.classes)), "interval": None}


def differences(first: Probed, controls: list[Probed]) -> Iterator[dict[str, object]]:
    """The encoder against the mean of its controls, patient sample by patient sample."""
    if controls:
        gap = Estimate.of(
            first.value - mean_of(controls).value, first.samples - np.mean([c.samples for c in controls], axis=0)
        )
        name = f"pretrained - mean of {len(controls)} random"
        yield {"name": name, "value": gap.value, "interval": gap.interval}


def images_seen(trial: Trial, judged: Sequence[int]) -> int | None:
    """How many of the judged rows the encoder was pretrained on, by its provenance; None where that cannot be told."""
    provenance = read_provenance(trial.settings.probe.encoder)
    known = {(data["dataset"], data["records"]) for data in provenance.get("data", [])}
    sources = zip(trial.shards.roots, trial.shards.manifests, strict=True)
    roots = {root for root, manifest in sources if (manifest["dataset"], manifest["records"]) in known}
    of = [(trial.shards.root(i), trial.shards.splits[i]) for i in judged]
    here = [split for root, split in of if root in roots]
    seen = provenance.get("split")
    if seen is None or not here:
        return len(here)
    data = trial.settings.data
    if (provenance.get("split_digest", ""), provenance.get("fold")) != (trial.shards.split_digest, data.fold):
        return None
    undivided = not any(trial.shards.every.column("split")) and not trial.shards.split_digest
    return len(here) if undivided else sum(split == seen.partition("-")[0] for split in here)


def mean_of(probed: list[Probed]) -> Estimate:
    """The mean figure of several encoders on the same images."""
    return Estimate.of(float(np.mean([p.value for p in probed])), np.mean([p.samples for p in probed], axis=0))


def notes(trial: Trial, judged: Sequence[int]) -> list[str]:
    """How the figures were made, for the reader of the report."""
    task, settings = trial.task, trial.settings
    seen = images_seen(trial, judged)
    told = f"saw {seen or 'none'} of the {len(judged)} judged images, without labels, as far as its provenance tells"
    return [
        f"Pretraining {told}."
        if seen is not None
        else "Pretraining used another split of the same data, so it may have seen judged images, without labels.",
        f"Intervals: 95 %, {settings.probe.replicates} bootstrap samples of patients. They do not cover the "
        "spread over pretraining seeds.",
        "C is chosen on inner folds of the training patients; no image is judged by a probe that saw its patient.",
        f"{task.metric} over all judged images together, not averaged over folds."
        + (f" AUC is of class {task.classes[1]!r}." if task.metric == "AUC" else ""),
    ]


def write_predictions(run: Run, trial: Trial, judgement: Judgement) -> None:
    """predictions.csv: one row a judged image."""
    task = trial.task
    buffer = io.StringIO()
    table = csv.writer(buffer, lineterminator="\n")
    table.writerow(["key", "patient", "truth", "fold", *(f"p_{name}" for name in task.classes)])
    for image, p, fold in zip(judgement.images, judgement.probabilities, judgement.fold, strict=True):
        row = trial.shards.rows[task.chosen[image]]
        table.writerow([row["key"], row["patient"], task.classes[task.truth[image]], fold, *(f"{x:.6f}" for x in p)])
    write_atomic(run.folder / "predictions.csv", buffer.getvalue())


def say(result: dict[str, object]) -> None:
    """The figures as a few lines."""
    print(f"{result['metric']} of {result['task']}, {result['n_images']} images of {result['n_patients']} patients:")
    for row in (*result["rows"], *result["differences"]):  # type: ignore[misc]
        interval = "" if row["interval"] is None else "  [{:.3f}, {:.3f}]".format(*row["interval"])
        print(f"  {row['name']:<34}{row['value']:.3f}{interval}")
