"""`miram evaluate`: a locked model, with its temperature and thresholds, on another set of images.

    OUT/result.json        the figures of a finetune run, and what they lost against the run's own test
    OUT/predictions.csv    one row a judged image
    OUT/figures/           ROC, precision and recall, calibration, confusion; maps of what counted
    OUT/config.yaml, …     as every run (engine/run.py); RUN/evaluations/NAME where no other folder is named

Nothing is chosen here: not by the new images, and not for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from pydantic import NonNegativeInt, PositiveInt

from ..data.config import DataSection
from ..data.opening import open_shards
from ..data.shards import ShardDataset
from ..engine.command import listed
from ..engine.config import Section, Tree, check, override, parse_overrides
from ..engine.errors import UserError
from ..engine.files import read_json
from ..engine.run import RESULT, Run, open_run
from ..pretrain.weights.loading import read_provenance
from .change import against, hashed
from .classify.cards import ModelCard, other_settings
from .classify.config import FinetuneSection
from .classify.figures import draw_figures
from .classify.judged import Judged
from .classify.judging import figures_of
from .classify.labels import Labelled, read_labels
from .classify.locked import Locked, read_locked, refuse_channels
from .classify.predictions import write_predictions
from .classify.subgroups import check_subgroups
from .classify.telling import say
from .classify.units import counted
from .examples import explained
from .sealed import CARD
from .seen import data_of, lineage

UNNAMED = ""  # a typing error in a key is to be said before that no images are named


class EvaluatedData(Section):
    """Other images, all of them where no split is named."""

    shards: str | list[str]
    """folder or URL (http, https, s3, gs) of a data set, or a list of them"""
    split: str | None = None
    """samples of this split (of a data set that has none, all); null: all"""
    split_file: str | None = None
    """file of `miram data split` that says what the splits are; null: the data's own"""
    fold: NonNegativeInt | None = None
    """of the split file: train is all but this fold, val is this fold"""
    task: str | None = None
    """label to compare with; null: that of the model"""


class EvaluateConfig(Section):
    """`miram evaluate`."""

    run: str
    """run of `miram finetune`, or its model folder"""
    out: str | None = None
    """run folder; null: RUN/evaluations/NAME"""
    encoder: str | None = None
    """where the encoder now lies, if it was moved"""
    seed: int = 0
    """of the bootstrap"""
    data: EvaluatedData
    subgroups: tuple[str, ...] = ()
    """columns or labels to report by, beside the usual ones, e.g. [site, vendor]"""
    replicates: PositiveInt = 1000
    """bootstrap samples of patients behind an interval"""
    explain: NonNegativeInt = 4
    """judged images shown with a map of what counted"""
    batch_size: PositiveInt = 64
    """images judged at once"""


def usage() -> str:
    """What `miram evaluate --help` says."""
    head = ["usage: miram evaluate RUN --data.shards=OTHER [--key=value …]", "", "keys:"]
    return "\n".join([*head, *listed(EvaluateConfig, but="run")])


def configured(run: str, arguments: Sequence[str]) -> EvaluateConfig:
    """The settings that a command line makes, the folder among them.

    Raises:
        UserError: a key or value is none, no images are named, or there is no run to keep the evaluation with.
    """
    place, overrides = run_of(Path(run)), parse_overrides(arguments)
    tree: Tree = {"run": str(place), "data": {"shards": UNNAMED}}
    if ("run",) in overrides:
        raise UserError(f"--run: the run is named first, as in miram evaluate {overrides['run',]} --data.shards=OTHER")
    for key, value in overrides.items():
        override(tree, key, value)
    settings = check(EvaluateConfig, tree, "miram evaluate", overrides)
    if settings.data.shards == UNNAMED:
        raise UserError(f"name the images to judge: miram evaluate {run} --data.shards=OTHER")
    if settings.out is not None:
        return settings
    if (place / CARD).is_file():
        raise UserError(
            f"{run} is a model's folder without its run: name a folder for the evaluation with --out=FOLDER"
        )
    return settings.model_copy(update={"out": str(place / "evaluations" / name_of(settings.data))})


def run_of(named: Path) -> Path:
    """The run whose model a user named, or what else was named."""
    inside = named.name == "model" and (named / CARD).is_file() and (named.parent / "config.yaml").is_file()
    return named.parent if inside else named


def name_of(data: EvaluatedData) -> str:
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
    shards = open_shards(DataSection(**settings.data.model_dump()))
    refuse_channels(locked.card, shards)
    check_subgroups(shards.rows, settings.subgroups, "subgroups")
    labelled = labels_for(locked.card, shards, settings.data.task)
    refuse_known(locked.card, shards, labelled)
    assert settings.out is not None
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

    Whatever label is taken for its truth, what the model predicts has the name that it was trained under.

    Raises:
        UserError: there is no such label, or none of its images is of a class of the model.
    """
    told = card.target
    name, classes = task or told.name, told.labels or told.classes
    found = read_labels(shards, name, told.kind, classes, told.separator, complete=False)
    return replace(found, target=told.target)


def refuse_known(card: ModelCard, shards: ShardDataset, labelled: Labelled) -> None:
    """Refuse patients that the model learnt from, or had its threshold chosen on.

    Raises:
        UserError: how many there are, and where.
    """
    known = np.isin(hashed(labelled.patients), card.trained_on.of)
    if not known.any():
        return
    patients = len(np.unique(labelled.patients[known])), counted(len(np.unique(labelled.patients)), "patient")
    same = {tuple(pair) for pair in card.trained_on.records} & records_of(shards)
    what = "the data set it was trained on" if same else "data that shares patients with its training"
    raise UserError(
        f"{', '.join(shards.roots)}: the model was trained on {patients[0]} of the {patients[1]}, so these "
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
    content = figures_of(judged, shards.rows, section, settings.seed, settings.data.task)
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
        f"Model {locked.digest[:16]}, trained on {counted(card.trained_on.images, 'image')} of "
        f"{counted(card.trained_on.patients, 'patient')}, with its temperature ({card.temperature:.3g}) and thresholds "
        "as they were locked. None of these patients is among its own, as far as hashed ids tell: a patient under "
        "another key or data set's name has other ids."
    ]
    if settings.data.task not in (None, card.target.name):
        lines.append(f"The label {settings.data.task!r} of these images was taken as {card.target.name!r}.")
    if labelled.left_out:
        told = ", ".join(f"{name!r} ({count})" for name, count in labelled.left_out.items())
        lines.append(f"Labels that no class of the model takes, and their images: {told}.")
    kin = lineage(read_provenance(settings.encoder or card.encoder))
    if set().union(*map(data_of, kin)) & records_of(shards):
        lines.append("The encoder, or one that it comes from, was pretrained on this data set, without labels.")
    ingested = {f"{m['dataset']}: {told}." for m in shards.manifests if (told := other_settings(card, m))}
    return [*lines, *sorted(ingested)]
