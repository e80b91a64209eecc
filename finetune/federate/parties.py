"""Who has which images: the sites of a simulation, and what each of them keeps to judge by.

Legend: n labelled images.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...data.shards import ShardDataset
from ...engine.errors import UserError, did_you_mean
from ...engine.metrics import Ints
from ...engine.seeding import stable_seed
from ..classify.labels import Labelled
from ..classify.search import largest_division
from ..task import grouped_folds
from .config import FederateSection

ODD = re.compile(r"[^a-z0-9_-]+")
EACH = "shards"  # of federate.by: every data set of data.shards is a site


@dataclass(frozen=True)
class Part:
    """Numbers of a site's labelled images: those that it trains on, and those of other patients that judge."""

    fit: Ints
    test: Ints
    official: bool


def divide(labelled: Labelled, shards: ShardDataset, section: FederateSection, seed: int) -> dict[str, Part]:
    """The images of every site, in the order of their names.

    Raises:
        UserError: a site has too few patients, a patient is at two sites, or nothing says what the sites are.
    """
    whose = sites_of(labelled, shards, section, seed)
    if section.by is not None and len(np.unique(whose)) < 2:
        raise UserError(
            f"federate.by={section.by}: all labelled images are of one site, {whose[0]}; take another column"
        )
    if twice := shared(labelled.patients, whose):
        raise UserError(
            f"{twice} patients are at several sites, so that one site's training would know another's test; divide by "
            "something that keeps a patient together"
        )
    return {
        name: held_out(labelled, np.flatnonzero(whose == name), name, section, seed)
        for name in np.unique(whose).tolist()
    }


def sites_of(labelled: Labelled, shards: ShardDataset, section: FederateSection, seed: int) -> NDArray[np.str_]:
    """(n,) name of the site of every image.

    Raises:
        UserError: as `divide`.
    """
    if section.by is not None:
        return named(column(labelled, shards, section.by))
    if section.sites is None:
        return np.full(len(labelled.rows), section.name)
    if section.sites == 1:
        return np.full(len(labelled.rows), "site-1")
    task = labelled.strata
    folds = grouped_folds(task.truth, task.patients, section.sites, stable_seed(seed, "sites"), task, "federate.sites")
    found = np.full(len(labelled.rows), "", dtype="<U32")
    for number, (_, images) in enumerate(folds, 1):
        found[images] = f"site-{number}"
    return found


def column(labelled: Labelled, shards: ShardDataset, by: str) -> Sequence[str]:
    """(n,) what says the site of every image.

    Raises:
        UserError: there is no such column or label, or it is empty somewhere.
    """
    if by == EACH:
        called = short(shards.roots)
        return [called[shards.root(int(row))] for row in labelled.rows]
    known = ["dataset", *shards.tasks, EACH]
    if by not in known:
        raise UserError(f"federate.by={by}: the data has no such column{did_you_mean(by, known)}")
    values = shards.rows.column("dataset") if by == "dataset" else shards.labels(by)
    found = [str(values[int(row)]) for row in labelled.rows]
    if empty := found.count(""):
        raise UserError(f"federate.by={by}: {empty} labelled images do not say their site; take another column")
    return found


def short(roots: Sequence[str]) -> dict[str, str]:
    """Of each data set's place the last parts, as many as tell all apart."""
    split = {root: root.rstrip("/").split("/") for root in roots}
    for count in range(1, 1 + max(map(len, split.values()))):
        called = {root: "/".join(parts[-count:]) for root, parts in split.items()}
        if len(set(called.values())) == len(called):
            break
    return called


def named(values: Sequence[str]) -> NDArray[np.str_]:
    """(n,) values as names that may travel.

    Raises:
        UserError: two values would have the same name.
    """
    names = {value: ODD.sub("-", value.lower()).strip("-")[:32] or "site" for value in sorted(set(values))}
    for one, name in names.items():
        other = next(value for value in names if names[value] == name)
        if other != one:
            raise UserError(f"federate.by: {other!r} and {one!r} would both be called {name!r}; rename one of them")
    return np.array([names[value] for value in values])


def shared(patients: NDArray[np.str_], whose: NDArray[np.str_]) -> int:
    """How many patients are at several sites."""
    pairs = np.unique(np.column_stack([patients, whose]), axis=0)
    return int((np.unique(pairs[:, 0], return_counts=True)[1] > 1).sum())


def held_out(labelled: Labelled, images: Ints, name: str, section: FederateSection, seed: int) -> Part:
    """The official train and test images of a site, or a share of its patients to judge by.

    Raises:
        UserError: it has too few patients of a class to hold some of each out.
    """
    splits = labelled.splits[images]
    if {"train", "test"} <= set(splits.tolist()):
        return Part(images[splits != "test"], images[splits == "test"], official=True)
    task = labelled.strata
    classes, truth = np.unique(task.truth[images], return_inverse=True)
    parts = max(2, round(1 / section.holdout))
    pairs = largest_division(truth, task.patients[images], parts, stable_seed(seed, "holdout"), task)
    if len(classes) < 2 or not pairs:
        raise UserError(
            f"site {name} has too few patients of two classes to train on some and judge by others "
            f"({len(np.unique(task.patients[images]))} in all); join it with another site, or label more"
        )
    fit, test = pairs[0]
    return Part(images[fit], images[test], official=False)
