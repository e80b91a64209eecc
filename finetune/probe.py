"""The probe stage: encoders and a labelled data set in, figures with intervals out.

    RUN/result.json              the headline (first method, first encoder), then a row for every method and encoder
    RUN/predictions.csv          the headline's probabilities, one row a judged image
    RUN/predictions_METHOD.csv   those of the other methods
    RUN/../features/             cached features, shared by the runs beside this one

Every encoder is judged by every method on the same images and folds, and compared on the same bootstrap samples.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from ..engine.config import load
from ..engine.files import read_json, write_atomic
from ..engine.metrics import Estimate, chance
from ..engine.run import RESULT, Run, open_run
from ..pretrain.weights.loading import encoder_digest
from .classify.bootstrap import cell
from .config import Method, ProbeConfig
from .figures import CAPTION, draw_probe
from .seen import seen
from .task import Task
from .trial import Probed, Trial, contestants

FEW_PATIENTS = 50  # below, intervals of a bootstrap over patients are too short to be left without a word
CHOICES: Mapping[Method, str] = {
    "linear": "C of linear",
    "sweep": "learning rate, block and pooling of sweep",
    "knn": "number of neighbours and temperature of knn",
    "attentive": "length of training of attentive",
    "mae_linear": "nothing of mae_linear",
}


def probe(config: str, arguments: Sequence[str] = ()) -> Run:
    """`miram probe CONFIG --a.b=value …`.

    Raises:
        UserError: configuration, encoder, data or run folder are not usable.
    """
    settings = load(ProbeConfig, config, arguments)
    trial = Trial.of(settings)
    encoders = contestants(settings)
    named = {"encoder" if e.role == "first" else f"encoder {e.name}": e for e in encoders if e.role != "control"}
    inputs = trial.shards.inputs | {name: encoder_digest(e.source) for name, e in named.items()}
    if not (Path(settings.out) / "result.json").exists():
        for encoder in named.values():  # now, and not after hours, or in a run folder that is then in the way
            trial.check(encoder)
    run = open_run(settings, settings.out, "probe", inputs)
    if run.finished:
        print(f"{run.folder} is finished; nothing to do")
        say(read_json(run.folder / "result.json", RESULT))
        return run
    with run.recorded():
        probed = [p for encoder in encoders for p in trial.probe(encoder, run.folder.parent / "features")]
        write_result(run, trial, probed)
        write_predictions(run, trial, probed)
        figure = run.caption({"probe.png": CAPTION}) / "probe.png"
        draw_probe(figure, trial.task, probed)
    say(read_json(run.folder / "result.json", RESULT))
    return run


# ---------------------------------------------------------------------------------------------- what is written


def write_result(run: Run, trial: Trial, probed: list[Probed]) -> None:
    """result.json: the headline's figure first, then every row, then differences on the same bootstrap samples."""
    first, task, split = probed[0], trial.task, trial.settings.data.split
    judged = first.judgement.images
    encoders = [p for p in probed if p.method == first.method and p.encoder.role != "control"]
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
            "rows": list(rows(trial, probed)),
            "differences": list(differences(trial, probed)),
            "tables": list(tables(trial, probed)),
            "notes": notes(trial, task.chosen[judged].tolist()),
            "encoders": [{"name": p.encoder.name, "encoder": p.encoder.source, "keys": p.keys} for p in encoders],
        }
    )


def by_method(trial: Trial, probed: list[Probed]) -> Iterator[tuple[str, list[Probed], list[Probed]]]:
    """What rows of a method are called by (nothing where there is one method), its encoders and its controls."""
    for method in trial.settings.probe.methods:
        of = [p for p in probed if p.method == method]
        prefix = f"{method}: " if len(trial.settings.probe.methods) > 1 else ""
        yield prefix, [p for p in of if p.encoder.role != "control"], [p for p in of if p.encoder.role == "control"]


def rows(trial: Trial, probed: list[Probed]) -> Iterator[dict[str, object]]:
    """For each method every encoder and the controls' mean; at last the majority class."""
    called = {"first": "{} encoder", "beside": "{}", "control": "{} weights"}
    for prefix, encoders, controls in by_method(trial, probed):
        for p in (*encoders, *controls):
            detail = f"{tally(p.judgement.chosen)}; by fold {', '.join(f'{v:.3f}' for v in p.folds)}"
            name = prefix + called[p.encoder.role].format(p.encoder.name)
            yield {"name": name, "value": p.value, "interval": p.estimate.interval, "detail": detail}
        if len(controls) > 1:
            mean = mean_of(controls)
            name = f"{prefix}mean of {len(controls)} random"
            yield {"name": name, "value": mean.value, "interval": mean.interval}
    majority = chance(trial.task.metric, len(trial.task.classes))
    yield {"name": "majority class", "value": majority, "interval": None}


def tally(chosen: Sequence[str]) -> str:
    """What was chosen, the most frequent first, and in how many folds: `C 10 in 4 of 5; C 1 in 1`."""
    (first, most), *others = Counter(chosen).most_common()
    if not others:
        return first
    return "; ".join([f"{first} in {most} of {len(chosen)}", *(f"{what} in {n}" for what, n in others)])


def differences(trial: Trial, probed: list[Probed]) -> Iterator[dict[str, object]]:
    """For each method the first encoder against those beside it and its controls' mean, patient sample by sample."""
    for prefix, (first, *beside), controls in by_method(trial, probed):
        others = [(p.encoder.name, [p]) for p in beside]
        if controls:
            others.append((f"mean of {len(controls)} random" if len(controls) > 1 else "random 1", controls))
        for name, group in others:
            samples = first.samples - np.mean([p.samples for p in group], axis=0)
            gap = Estimate.of(first.value - mean_of(group).value, samples)
            name = f"{prefix}{first.encoder.name} - {name}"
            yield {"name": name, "value": gap.value, "interval": gap.interval}


def tables(trial: Trial, probed: list[Probed]) -> Iterator[dict[str, object]]:
    """For each method with encoders beside the first: their size, and the share of its figure that they keep."""
    metric, by_chance = trial.task.metric, chance(trial.task.metric, len(trial.task.classes))
    for prefix, (first, *beside), controls in by_method(trial, probed):
        if not beside:
            continue
        untrained = [(f"mean of {len(controls)} random", controls)] if controls else []
        groups = [(p.encoder.name, [p]) for p in (first, *beside)] + untrained
        found = [
            [name, of[0].parameters, cell(mean_of(of)), cell(share(of, first)), cell(share(of, first, by_chance))]
            for name, of in groups
        ]
        yield {
            "title": f"{prefix}share of the first encoder's figure",
            "columns": ["encoder", "parameters", metric, "share", "share above chance"],
            "rows": found,
            "note": f"On the same images and bootstrap samples of patients; chance is {by_chance:.3g}.",
        }


def share(of: list[Probed], first: Probed, by_chance: float = 0.0) -> Estimate:
    """What part of the first encoder's figure, or of what it has above chance, others have in the mean."""
    mean = np.mean([np.r_[p.value, p.samples] for p in of], axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = (mean - by_chance) / (np.r_[first.value, first.samples] - by_chance)
    shares = np.where(np.isfinite(shares), shares, np.nan)
    return Estimate.of(float(shares[0]), shares[1:])


def mean_of(probed: list[Probed]) -> Estimate:
    """The mean figure of several encoders on the same images."""
    return Estimate.of(float(np.mean([p.value for p in probed])), np.mean([p.samples for p in probed], axis=0))


def notes(trial: Trial, judged: Sequence[int]) -> list[str]:
    """How the figures were made, for the reader of the report."""
    task, section, data = trial.task, trial.settings.probe, (trial.shards, trial.settings.data)
    first, *beside = (e for e in contestants(trial.settings) if e.role != "control")
    patients = len(np.unique(task.patients[np.isin(task.chosen, judged)]))
    few = f" With {patients} patients they are too short to be taken at their word." * (patients < FEW_PATIENTS)
    return [
        seen(*data, first.source, judged, name=first.name),
        *(seen(*data, e.source, judged, f"That of {e.name}", e.name) for e in beside),
        f"Intervals: 95 %, {section.replicates} bootstrap samples of patients. They hold the trained probes fixed: the "
        f"spread over folds, seeds of probes, random encoders and pretraining seeds is not in them.{few}",
        f"Chosen on inner folds of the training patients: {', '.join(CHOICES[method] for method in section.methods)}; "
        "no image is judged by a probe that saw its patient.",
        counted(task, len(trial.splits)),
    ]


def counted(task: Task, folds: int) -> str:
    """How one figure came of all judged images, as a sentence."""
    if task.metric != "AUC":
        return f"{task.metric} over all judged images together, not averaged over folds."
    of = f"AUC of class {task.classes[1]!r}"
    if folds == 1:
        return f"{of} over all judged images."
    return (
        f"{of}: the share of pairs of images in the right order, counted within folds only, a fold by its number of "
        "pairs; the probes of two folds are not on one scale. A ROC curve pools the folds."
    )


def write_predictions(run: Run, trial: Trial, probed: list[Probed]) -> None:
    """predictions.csv of the headline, predictions_METHOD.csv of the first encoder's other methods."""
    task = trial.task
    for p in (p for p in probed if p.encoder.role == "first"):
        buffer = io.StringIO()
        table = csv.writer(buffer, lineterminator="\n")
        table.writerow(["key", "patient", "truth", "fold", *(f"p_{name}" for name in task.classes)])
        judgement = p.judgement
        for image, found, fold in zip(judgement.images, judgement.probabilities, judgement.fold, strict=True):
            row = trial.shards.rows[task.chosen[image]]
            shares = (f"{x:.6f}" for x in found)
            table.writerow([row["key"], row["patient"], task.classes[task.truth[image]], fold, *shares])
        name = "predictions.csv" if p is probed[0] else f"predictions_{p.method}.csv"
        write_atomic(run.folder / name, buffer.getvalue())


def say(result: dict[str, object]) -> None:
    """The figures as a few lines."""
    print(f"{result['metric']} of {result['task']}, {result['n_images']} images of {result['n_patients']} patients:")
    told: list[dict[str, object]] = [*result["rows"], *result["differences"]]  # type: ignore[misc]
    width = max(len(str(row["name"])) for row in told) + 2
    for row in told:
        interval = "" if row["interval"] is None else "  [{:.3f}, {:.3f}]".format(*row["interval"])  # type: ignore[misc]
        print(f"  {row['name']:<{width}}{row['value']:.3f}{interval}")
