"""`miram evaluate`: a locked model, with its temperature and thresholds, on another set of images.

    OUT/result.json        the figures of a finetune run, and what they lost against the run's own test
    OUT/predictions.csv    one row a judged image
    OUT/figures/           ROC, precision and recall, calibration, confusion; maps of what counted
    OUT/config.yaml, …     as every run (engine/run.py); RUN/evaluations/NAME where no other folder is named

Nothing is chosen here: not by the new images, and not for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import NonNegativeInt, PositiveInt

from ..data.config import DataSection
from ..data.opening import open_shards
from ..data.shards import ShardDataset
from ..engine.config import Section, check, keys, override, parse_overrides
from ..engine.errors import UserError
from ..engine.files import read_json
from ..engine.run import RESULT, Run, open_run
from ..pretrain.weights.loading import read_provenance
from .change import against
from .classify.cards import ModelCard
from .classify.config import FinetuneSection
from .classify.figures import draw_figures
from .classify.judged import Judged
from .classify.judging import figures_of
from .classify.labels import Labelled, read_labels
from .classify.locked import Locked, read_locked, refuse_channels
from .classify.predictions import write_predictions
from .classify.subgroups import check_subgroups
from .examples import explained


class EvaluatedData(DataSection):
    """Other images, all of them where no split is named."""

    split: str | None = None
    """samples of this split (of a data set that has none, all); null: all"""
    task: str | None = None
    """label to compare with; null: that of the model"""


class EvaluateConfig(Section):
    """`miram evaluate`."""

    run: str
    """run of `miram finetune`, or its model folder"""
    out: str
    """run folder; null: RUN/evaluations/NAME"""
    encoder: str | None = None
    """where the encoder now lies, if it was moved"""
    seed: int = 0
    """of the bootstrap"""
    data: EvaluatedData
    subgroups: tuple[str, ...] = ()
    """columns or labels to report by, beside the usual ones"""
    replicates: PositiveInt = 1000
    """bootstrap samples of patients behind an interval"""
    explain: NonNegativeInt = 4
    """judged images shown with a map of what counted"""
    batch_size: PositiveInt = 64
    """images judged at once"""


def usage() -> str:
    """What `miram evaluate --help` says."""
    lines = ["usage: miram evaluate RUN --data.shards=OTHER [--key=value …]", "", "keys:"]
    for key, kind, default, meaning in keys(EvaluateConfig):
        if key != "run":
            lines += [f"  --{key}  {kind}  [{'null' if key == 'out' else default}]", f"      {meaning}"]
    return "\n".join(lines)


def configured(run: str, arguments: Sequence[str]) -> EvaluateConfig:
    """The settings that a command line makes.

    Raises:
        UserError: a key or value is none.
    """
    overrides, tree = parse_overrides(arguments), {"run": run}
    if ("data", "shards") not in overrides and not any(key[0] not in EvaluateConfig.model_fields for key in overrides):
        raise UserError(f"name the images to judge: miram evaluate {run} --data.shards=OTHER")
    for key, value in overrides.items():
        override(tree, key, value)
    if tree.get("out") is None:
        settings = check(EvaluateConfig, tree | {"out": ""}, "miram evaluate", overrides)
        tree["out"] = str(Path(run) / "evaluations" / name_of(settings.data))
    return check(EvaluateConfig, tree, "miram evaluate", overrides)


def name_of(data: DataSection) -> str:
    """What the folder of an evaluation is called: data sets, split and task."""
    sets = [data.shards] if isinstance(data.shards, str) else data.shards
    names = [place.rstrip("/").rpartition("/")[2] or "data" for place in sets]
    parts = ("+".join(names), data.split, None if data.fold is None else f"fold{data.fold}", data.task)
    return "-".join(part for part in parts if part)


def evaluate(run: str, arguments: Sequence[str] = ()) -> Run:
    """`miram evaluate RUN --data.shards=OTHER …`.

    Raises:
        UserError: the model is not sound, the data does not fit it, or it learnt from these patients.
    """
    settings = configured(run, arguments)
    locked = read_locked(settings.run, settings.encoder)
    shards = open_shards(settings.data)
    refuse_channels(locked.card, shards)
    check_subgroups(shards.rows, settings.subgroups)
    labelled = labels_for(locked.card, shards, settings.data.task)
    refuse_known(locked.card, shards, labelled)
    place = open_run(settings, settings.out, "evaluate", shards.inputs | {"model": locked.digest})
    if place.finished:
        print(f"{place.folder} is finished; nothing to do")
    else:
        with place.recorded():
            write(place, replace(locked, cache=place.folder.parent / "features"), shards, labelled, settings)
    say(read_json(place.folder / "result.json", RESULT))
    return place


# ---------------------------------------------------------------------------------------------- may it be judged


def labels_for(card: ModelCard, shards: ShardDataset, task: str | None) -> Labelled:
    """The images that the model's classes take; labels it does not know are left out and counted.

    Raises:
        UserError: there is no such label, or none of its images is of a class of the model.
    """
    target = card.target
    return read_labels(
        shards, task or target.name, target.kind, target.labels or target.classes, target.separator, complete=False
    )


def refuse_known(card: ModelCard, shards: ShardDataset, labelled: Labelled) -> None:
    """Refuse patients that the model learnt from, or had its threshold chosen on.

    Raises:
        UserError: how many there are, and where.
    """
    known = np.isin([patient.rpartition("/")[2] for patient in labelled.patients.tolist()], card.trained_on.of)
    if not known.any():
        return
    patients = len(np.unique(labelled.patients[known])), len(np.unique(labelled.patients))
    same = {tuple(pair) for pair in card.trained_on.records} & records_of(shards)
    what = "the data set it was trained on" if same else "data that shares patients with its training"
    raise UserError(
        f"{', '.join(shards.roots)}: the model was trained on {patients[0]} of the {patients[1]} patients, so these "
        f"figures would be no test; this is {what}: name another set, or a split of it that was not used, as "
        "--data.split=test"
    )


def records_of(shards: ShardDataset) -> set[tuple[str, str]]:
    """(name, digest) of data sets."""
    return {(manifest["dataset"], manifest["records"]) for manifest in shards.manifests}


# ---------------------------------------------------------------------------------------------- what is written


def write(place: Run, locked: Locked, shards: ShardDataset, labelled: Labelled, settings: EvaluateConfig) -> None:
    """Judge, and tell."""
    card, n = locked.card, len(labelled.rows)
    judged = Judged(
        labelled=labelled,
        images=np.arange(n),
        logits=locked.logits(shards, labelled.rows, settings.batch_size),
        fold=np.zeros(n, np.int64),
        temperatures={0: card.temperature},
        thresholds={0: card.thresholds},
    )
    section = section_of(card, settings)
    content = figures_of(judged, shards.rows, section, settings.seed)
    differences, tables, told = against(Path(settings.run), card, judged, content, section, settings.seed)
    content["differences"] = differences
    content["tables"] = [*content["tables"][:1], *tables]
    content["notes"] = [*notes(locked, shards, labelled, settings), *told, *content["notes"]]
    content |= {"split": settings.data.split or "all images", "model": locked.digest}
    write_predictions(place.folder / "predictions.csv", judged, card.target.separator)
    figures = place.folder / "figures"
    captions = draw_figures(figures, judged, section, settings.seed)
    captions |= explained(locked, shards, judged, figures, settings.explain, settings.batch_size)
    place.caption(captions)
    place.result(content)


def section_of(card: ModelCard, settings: EvaluateConfig) -> FinetuneSection:
    """What figures are made by: the model's read-out and level, this evaluation's subgroups."""
    same = ("encoder", "method", "input", "tiles", "readout", "headline", "operating_point", "operating_at")
    values = {name: getattr(card, name) for name in same}
    return FinetuneSection(**values, subgroups=settings.subgroups, replicates=settings.replicates)


def notes(locked: Locked, shards: ShardDataset, labelled: Labelled, settings: EvaluateConfig) -> list[str]:
    """What was judged by what."""
    card = locked.card
    lines = [
        f"Model {locked.digest[:16]}, trained on {card.trained_on.images} images of {card.trained_on.patients} "
        f"patients, with its temperature ({card.temperature:.3g}) and thresholds as they were locked. None of these "
        "patients is among its own, as far as hashed ids tell: a patient under another key or data set's name has "
        "other ids."
    ]
    if labelled.left_out:
        told = ", ".join(f"{name!r} ({count})" for name, count in labelled.left_out.items())
        lines.append(f"Labels that no class of the model takes, and their images: {told}.")
    data = read_provenance(settings.encoder or card.encoder).get("data", [])
    if {(one["dataset"], one["records"]) for one in data} & records_of(shards):
        lines.append("The encoder was pretrained on this data set, without labels.")
    differing = (how for how in (m.get("preprocessing", {}) for m in shards.manifests) if how not in card.preprocessing)
    if any(True for _ in differing):
        lines.append("These images were ingested with other settings than those of the training (manifest.json).")
    return lines


def say(result: Mapping[str, Any]) -> None:
    """The figures as a few lines."""
    print(f"{result['metric']} of {result['task']}, {result['n_images']} images of {result['n_patients']} patients:")
    told = [*result["rows"], *result["differences"]]
    width = max(len(row["name"]) for row in told) + 2
    for row in told:
        interval = "" if row["interval"] is None else "  [{:.3f}, {:.3f}]".format(*row["interval"])
        value = "-" if row["value"] is None else f"{row['value']:.3f}"
        print(f"  {row['name']:<{width}}{value}{interval}")
