"""What a federation is worth: every site's test, judged by its own model, the federation's and one of all images.

All differences are paired: the same images, and in every bootstrap sample the same patients.

Legend: j judged images, w outputs, R bootstrap samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...engine.metrics import Estimate, Floats, Ints, headline
from ..classify.bootstrap import Draws, Table, cell
from ..classify.comparison import Told
from ..classify.config import FinetuneSection
from ..classify.judged import Judged
from ..classify.judging import NOTHING, count
from ..classify.labels import Labelled
from .parties import Part
from .server import RoundRecord

FEDERATED, CENTRALISED, LOCAL = "federated", "centralised", "local"
MEAN = "mean of sites"
Samples = Mapping[str, Floats]  # by site, (1 + R,): the figure, then its bootstrap samples


@dataclass(frozen=True)
class Judges:
    """The tests of all sites, and how they are scored."""

    labelled: Labelled
    section: FinetuneSection
    parts: Mapping[str, Part]
    seed: int

    @property
    def images(self) -> Ints:
        """(j,) of all tests, site by site."""
        return np.concatenate([part.test for part in self.parts.values()])

    def draws(self) -> Draws:
        """Bootstrap samples of the patients of all sites."""
        truth, patients = self.labelled.truth[self.images], self.labelled.patients[self.images]
        return Draws.of(truth, patients, self.section.replicates, self.seed)

    def scored(self, logits: Floats, draws: Draws) -> dict[str, Floats]:
        """(j, w) of a model -> its figure at every site, and of the sites' mean under "mean of sites"."""
        found, begin = {}, 0
        for name, part in self.parts.items():
            found[name] = self.at_site(part.test, logits[begin : begin + len(part.test)], draws)
            begin += len(part.test)
        return found | {MEAN: np.mean([*found.values()], axis=0)}

    def at_site(self, images: Ints, logits: Floats, draws: Draws) -> Floats:
        """(1 + R,) of some images."""
        one = Judged(self.labelled, images, logits, np.zeros(len(images), np.int64), {0: 1.0}, {0: {}})
        told = Told(
            one.cases(self.section.headline, self.section.readout), {"metric": headline(one.labelled.target.kind)}
        )
        return np.concatenate([[told.value], told.samples(draws)])


def content(
    judges: Judges, scored: Mapping[str, Samples], records: Sequence[RoundRecord], passes: str
) -> dict[str, Any]:
    """What result.json says: the mean of the sites leads.

    Args:
        judges: the tests.
        scored: by model, federated, centralised and local-SITE; the latter two may be missing.
        records: of the federation's rounds.
        passes: what was the same for all that trained: steps, or passes over their images.
    """
    labelled, images = judges.labelled, judges.images
    local = own(scored, judges.parts)
    models = {FEDERATED: scored[FEDERATED]} | ({LOCAL: local} if local else {})
    models |= {CENTRALISED: scored[CENTRALISED]} if CENTRALISED in scored else {}
    rows = [{"name": f"{name}, {MEAN}", **(estimate(of[MEAN]) or NOTHING)} for name, of in models.items()]
    others = {name: of for name, of in models.items() if name != FEDERATED}
    return {
        "task": labelled.target.name,
        "kind": labelled.target.kind,
        "level": judges.section.headline,
        "metric": headline(labelled.target.kind),
        **(estimate(scored[FEDERATED][MEAN]) or NOTHING),
        "n_images": len(images),
        "n_patients": len(np.unique(labelled.patients[images])),
        "classes": count(labelled.target.kind, labelled.target.classes, labelled.truth[images]),
        "rows": rows,
        "differences": [
            {"name": f"{FEDERATED} - {name}", **(estimate(scored[FEDERATED][MEAN] - of[MEAN]) or NOTHING)}
            for name, of in others.items()
        ],
        "tables": [
            sites_table(judges, local, scored[FEDERATED], scored.get(CENTRALISED, {}), passes),
            crossed_table(scored, [*judges.parts]),
            rounds_table(records),
        ],
    }


def own(scored: Mapping[str, Samples], parts: Mapping[str, Part]) -> Samples:
    """Every site's figure by the model of its own, and their mean; nothing where there are none."""
    found = {name: scored[f"{LOCAL}-{name}"][name] for name in parts if f"{LOCAL}-{name}" in scored}
    return found | {MEAN: np.mean([*found.values()], axis=0)} if found else {}


def estimate(samples: Floats) -> dict[str, Any] | None:
    """A cell of (1 + R,) figures."""
    return cell(Estimate.of(float(samples[0]), samples[1:]))


def gap(one: Floats, other: Floats) -> dict[str, Any] | None:
    """A cell of the paired difference."""
    found = estimate(one - other)
    return None if found is None else {**found, "signed": True}


def sites_table(judges: Judges, local: Samples, federated: Samples, centralised: Samples, passes: str) -> Table:
    """A row a site: images, the three models, and what federating gained and lost."""
    columns = ["site", "training images", "test images", "test patients"]
    columns += ["local"] * bool(local) + [FEDERATED] + [CENTRALISED] * bool(centralised)
    columns += [f"{FEDERATED} - local"] * bool(local) + [f"{FEDERATED} - {CENTRALISED}"] * bool(centralised)
    rows = []
    for name in federated:
        others = [other[name] for other in (local, centralised) if other]
        three = [*([local[name]] if local else []), federated[name], *([centralised[name]] if centralised else [])]
        told = [estimate(figures) for figures in three] + [gap(federated[name], other) for other in others]
        rows.append([name, *counts(judges, name), *told])
    return {"title": "Sites", "columns": columns, "rows": rows, "note": WHAT.format(passes)}


WHAT = (
    "local: trained on the site's own images alone; centralised: on the training images of all sites; each for as many "
    "{} as one site took. The mean of sites counts every site alike."
)


def counts(judges: Judges, name: str) -> list[int]:
    """Training images, test images and test patients of a site, or of all."""
    parts = [judges.parts[name]] if name in judges.parts else [*judges.parts.values()]
    patients = sum(len(np.unique(judges.labelled.patients[part.test])) for part in parts)
    return [sum(len(part.fit) for part in parts), sum(len(part.test) for part in parts), patients]


def crossed_table(scored: Mapping[str, Samples], sites: Sequence[str]) -> Table:
    """A row a model, a column a site: how a model does on images of others."""
    rows = [[model, *(estimate(of[site]) for site in sites)] for model, of in scored.items()]
    return {"title": "Every model at every site", "columns": ["model", *sites], "rows": rows, "note": ""}


def rounds_table(records: Sequence[RoundRecord]) -> Table:
    """A row a round: who took part, the loss, and what travelled."""
    rows: list[list[Any]] = []
    for record in records:
        refused = "; ".join(f"{site}: {reason}" for site, reason in record.refused.items())
        rows.append(
            [record.round, ", ".join(record.sites), refused or None, record.loss, record.bytes_up, record.bytes_down]
        )
    columns = ["round", "sites", "refused", "loss", "bytes up", "bytes down"]
    return {"title": "Rounds", "columns": columns, "rows": rows, "note": "Bytes are those of all sites together."}
