"""What a finetune run says of how its models came about: notes, cost, search.csv."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...engine.metrics import Ints, headline
from ..seen import seen
from .bench import Approach, Bench
from .judged import Judged
from .search import UNDECIDED, Nested

HOT = 10.0  # a temperature beyond makes probabilities of hardly anything


def notes(bench: Bench, approach: Approach[Any], parts: Sequence[Ints], found: Sequence[Nested]) -> Iterator[str]:
    """For the reader of the report.

    Args:
        bench: the run.
        approach: how it was trained.
        parts: of each outer fold the images whose labels were used.
        found: what came of each.
    """
    section, labelled = bench.section, bench.labelled
    trained = sorted(len(np.unique(labelled.patients[part])) for part in parts)
    many = str(trained[0]) if trained[0] == trained[-1] else f"{trained[0]} to {trained[-1]}"
    share = "all" if section.fraction == 1 else f"{100 * section.fraction:.3g} %"
    values = ", ".join(f"{nested.value:g}" for nested in found)
    yield (
        f"Method {section.method} on {Path(section.encoder).name}, input {section.input}; trained on labels of {many} "
        f"patients, {share} of those who are not judged by the same model."
    )
    yield (
        f"Chosen by {'; '.join(dict.fromkeys(nested.inner for nested in found))}: {approach.knob} {values}, of "
        f"{len(approach.values)} candidates each; temperatures {', '.join(f'{n.temperature:.2f}' for n in found)}."
    )
    if any(nested.inner == UNDECIDED for nested in found):
        yield "With too few patients to choose, no temperature or threshold was chosen, whatever the other notes say."
    if any(nested.temperature > HOT for nested in found):
        yield f"A temperature beyond {HOT:g} says that the model is far too sure, or tells hardly anything apart."
    if labelled.left_out:
        told = ", ".join(f"{name!r} ({count})" for name, count in labelled.left_out.items())
        yield f"Labels that no class takes, and their images: {told}."
    if len(parts) > 1 and section.final:
        who = "all patients" if section.fraction == 1 else f"{share} of all patients"
        yield f"RUN/model was trained on {who} by the same procedure, whose worth the folds tell."


def taught(bench: Bench, judged: Judged, parts: Sequence[Ints]) -> Iterator[str]:
    """Of the teacher, if there is one: which, how well it does what the student does, and what it knew.

    Args:
        bench: the run.
        judged: by the students.
        parts: of each outer fold the images whose labels were used.
    """
    teacher, section, labelled = bench.teacher, bench.section, bench.labelled
    if teacher is None:
        return
    card, metric = teacher.locked.card, headline(labelled.target.kind)
    found = teacher.figure(bench.shards, judged, section, bench.settings.seed)
    value = "no figure" if found is None else f"{found.value:.3f} [{found.interval[0]:.3f}, {found.interval[1]:.3f}]"
    yield (
        f"Taught by model {teacher.locked.digest[:16]} ({card.method}, task {card.target.name}) with weight "
        f"{teacher.weight:g} and temperature {teacher.temperature:g}: it has {metric} by {section.headline} {value} on "
        "the same judged images, none of whose patients it learnt from, as far as hashed ids tell."
    )
    used = np.unique(labelled.patients[np.concatenate(parts)])
    if known := len(np.intersect1d(used, teacher.acquainted(labelled))):
        yield (
            f"The teacher learnt from {known} of the {len(used)} patients whose labels were used: what was chosen on "
            "them (rate, temperature, thresholds) was chosen with its help; the judged images are apart."
        )
    judges = [int(row) for row in bench.rows(judged.images)]
    encoder = (section.teacher and section.teacher.encoder) or card.encoder
    yield seen(bench.shards, bench.settings.data, encoder, judges, "The teacher's pretraining", "The teacher's encoder")


def cost(found: Sequence[Nested]) -> dict[str, Any]:
    """What it took: of the chosen trainings size, peak and pace, of all of them the time."""
    chosen = [nested.trainings[-1] for nested in found]
    every = [training for nested in found for training in nested.trainings]
    same = {key: chosen[0][key] for key in ("trainable", "head", "adapter_bytes")}
    pace = [training["images_per_s"] for training in chosen if "images_per_s" in training]
    return same | {
        "peak_memory_bytes": max(training["peak_memory_bytes"] for training in chosen),
        "images_per_s": float(np.median(pace)) if pace else None,
        "seconds": round(sum(training["seconds"] for training in every), 1),
        "trainings": len(every),
    }


def search_table(found: Sequence[Nested]) -> str:
    """search.csv: a row a candidate of an outer fold, with the leading metric by image on every inner one."""
    buffer = io.StringIO()
    table = csv.writer(buffer, lineterminator="\n")
    table.writerow(["fold", "value", "chosen", "mean", "scores"])
    for number, nested in enumerate(found):
        for candidate in nested.candidates:
            scores = " ".join(f"{score:.4f}" for score in candidate.scores)
            chosen = int(candidate.value == nested.value)
            table.writerow([number, f"{candidate.value:g}", chosen, f"{candidate.mean:.4f}", scores])
    return buffer.getvalue()
