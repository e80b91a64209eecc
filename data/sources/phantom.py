"""Phantoms as an archive: they take the same road to shards as films do."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from ..archive import Archive
from ..ingest import Outcome, ingest
from ..phantom import PhantomSettings, records

# Phantoms have no secrets: a fixed key gives the same phantoms the same bytes everywhere.
KEY = b"miram phantoms"


def make_phantoms(out: Path, patients: int, settings: PhantomSettings, workers: int | None = None) -> Outcome:
    """Write the phantoms of that many patients as a data set.

    Raises:
        UserError: `out` holds something else.
    """
    archive = Archive(
        dataset="phantom",
        licence="made by miram, free of rights",
        records=records(patients, settings),
        settings={"phantom": asdict(settings)},
    )
    return ingest(archive, out, KEY, workers)
