"""An archive some of whose images cannot be read, in a module of its own so that spawned workers find it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from miram.data.archive import Archive
from miram.data.image import UnreadableImage
from miram.data.phantom import PhantomSettings, records
from miram.data.record import Film


def unreadable(number: int) -> Film:
    """What reading a broken file does."""
    raise UnreadableImage(f"it is broken in way {number % 3}")


def archive(patients: int = 20) -> Archive:
    """Phantoms, of which every seventh cannot be read."""
    return fragile(Archive(dataset="p", licence="none", records=records(patients, PhantomSettings(size=96))))


def fragile(archive: Archive) -> Archive:
    """The archive with every seventh image broken."""
    records = [replace(r, read=partial(unreadable, i)) if i % 7 == 6 else r for i, r in enumerate(archive.records)]
    return replace(archive, records=records, quarantine=False)
