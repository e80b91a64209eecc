"""The data that weights learnt from, and what its licences mean for them.

Every set counts: of the tuning, of the encoder's pretraining, of the weights that this started from, of a teacher.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ...data.config import DataSection
from ...data.opening import open_shards
from ...data.shards import ShardDataset
from ...data.sources.embed import LICENCE as EMBED
from ...engine.config import check, read_tree
from ...engine.errors import UserError
from ...pretrain.weights.loading import read_provenance
from ..classify.cards import ModelCard
from ..sealed import CARD, CLASSIFIER, read_card
from ..segment.locked import SegmentCard

Licence = dict[str, str]  # dataset, licence, used_for
NEVER_TRAINED = "random"
RESEARCH = re.compile(
    r"non-?commercial|research (only|use|agreement)|\bNC\b|not to be passed on|restricted", re.IGNORECASE
)
FREE = re.compile(r"free of rights|CC ?BY [\d.]+$|CC0|public domain", re.IGNORECASE)
FORBIDDEN = "no release of weights trained on it without written permission of Emory University School of Medicine"
RESTRICTED = "non-commercial research, or less: read the licence before you pass weights on"
ATTRIBUTED = "none that bind weights are known; name the data set"
UNSTATED = "unknown: ask whoever gave you the data before you pass weights on"


def provenance_of(encoder: str) -> dict[str, Any]:
    """How an encoder came about, as far as that can be told from here."""
    try:
        return read_provenance(encoder) or {"init": {"from": encoder}}
    except UserError:  # a copied model may be read where its encoder was named otherwise
        return {}


def of_pretraining(provenance: Mapping[str, Any], used_for: str = "pretraining") -> list[Licence]:
    """Every data set that the weights learnt from: the encoder's own, its start's and its teacher's."""
    own = list(of_data(provenance.get("data"), used_for))
    if not own and "objective" in provenance:  # it was trained, on what nobody wrote down
        own = [unknown(used_for)]
    found = own + [
        licence
        for key, whose in (("init", "the encoder it started from"), ("teacher", "its teacher"))
        if (before := provenance.get(key))
        for licence in of_another(before, f"pretraining of {whose}")
    ]
    return found or ([] if never_trained(provenance) else [unknown(used_for)])


def of_data(rows: Any, used_for: str) -> Iterator[Licence]:
    """The data sets that a provenance names; what was edited away is unknown."""
    for row in rows if isinstance(rows, list | tuple) else [rows] if rows else []:
        said = row if isinstance(row, Mapping) else {}
        dataset, licence = (str(said.get(key) or "unknown") for key in ("dataset", "licence"))
        yield {"dataset": dataset, "licence": licence, "used_for": used_for}


def never_trained(provenance: Mapping[str, Any]) -> bool:
    """Whether it says that weights are as they were drawn; one that says nothing does not."""
    return provenance.keys() == {"init"} and origin(provenance["init"]).partition(":")[0] == NEVER_TRAINED


def origin(before: Any) -> str:
    """Where a start or a teacher is from."""
    return str(before.get("from", "") if isinstance(before, Mapping) else before)


def of_another(before: Any, used_for: str) -> list[Licence]:
    """The data behind a start or a teacher, which tell where they are from and, if ours, their provenance."""
    name = origin(before)
    if name.partition(":")[0] == NEVER_TRAINED:
        return []
    inside = before.get("provenance", before) if isinstance(before, Mapping) else {}
    if isinstance(inside, Mapping) and any(key in inside for key in ("data", "init", "teacher")):
        return of_pretraining(inside, used_for)
    public = name if name.startswith("timm:") else ""
    return [unknown(used_for, f"that of {public}" if public else "unknown")]


def unknown(used_for: str, dataset: str = "unknown") -> Licence:
    """What is said of data that nothing is known about."""
    return {"dataset": dataset, "licence": "unknown", "used_for": used_for}


def of_tuning(home: Path, card: ModelCard | SegmentCard) -> Iterator[Licence]:
    """The data sets of the tuning; their licences by the run's own data, if that is still where it was."""
    shards = shards_of(home)
    manifests = [] if shards is None else shards.manifests
    known = {(m["dataset"], m["records"]): str(m["licence"]) for m in manifests}
    for name, records in card.trained_on.records:
        yield {"dataset": name, "licence": known.get((name, records), "unknown"), "used_for": "tuning"}
    if not card.trained_on.records:
        yield unknown("tuning")
    section = settings_of(home).get("finetune")
    teacher = section.get("teacher") if isinstance(section, dict) else None
    if isinstance(teacher, dict):
        yield from of_teacher(str(teacher.get("run", "")), teacher.get("encoder"))


def of_teacher(run: str, encoder: str | None) -> list[Licence]:
    """The data behind the classifier whose answers this one learnt."""
    folder = Path(run) if (Path(run) / CARD).is_file() else Path(run) / "model"
    try:
        card = read_card(folder, CLASSIFIER, ModelCard)
    except UserError:
        return [unknown("tuning of its teacher")]
    found = [*of_pretraining(provenance_of(encoder or card.encoder)), *of_tuning(home_of(folder), card)]
    return [{**licence, "used_for": f"{licence['used_for']} of its teacher"} for licence in found]


def settings_of(home: Path) -> dict[str, Any]:
    """RUN/config.yaml as a tree; nothing where it is none."""
    try:
        return read_tree(str(home / "config.yaml"))
    except UserError:
        return {}


def shards_of(home: Path) -> ShardDataset | None:
    """The data of a run, if it still opens."""
    section = settings_of(home).get("data")
    if not isinstance(section, dict):
        return None
    try:
        return open_shards(check(DataSection, section, str(home / "config.yaml")))
    except (UserError, OSError, ValidationError):
        return None


def home_of(run: Path) -> Path:
    """The run's folder, however it was named: by itself, by its model's folder or by its encoder's file."""
    here = run.absolute()  # of "." neither name nor parent is told
    if run.is_file() or (here.name == "model" and (here.parent / "config.yaml").is_file()):
        return here.parent
    return run


# ---------------------------------------------------------------------------------------------- terms


def terms_of(licence: Licence) -> str:
    """What a data set's licence means for weights that learnt from it; a hint, no legal advice."""
    text = licence["licence"]
    if forbids(licence):
        return FORBIDDEN
    if RESEARCH.search(text):
        return RESTRICTED
    return ATTRIBUTED if FREE.search(text) else UNSTATED


def forbids(licence: Licence) -> bool:
    """Whether it is EMBED's, whose clause 5 keeps weights from being released; merged sets join their names."""
    named = "embed" in re.split(r"[^a-z0-9]+", licence["dataset"].lower())
    return named or EMBED in licence["licence"] or "EMBED" in licence["licence"]
