"""What a source is asked and what it hands over: the options a user may give it, and the records of an archive."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from ..engine.errors import UserError
from .dicom.reader import DicomOptions
from .record import Record


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """What a user may ask of a source. One that cannot do it refuses (`only`)."""

    labels: Path | None = None
    """table of what is known of each image, or of the archive where its own tables lie elsewhere"""
    masks: Path | None = None
    """folder of masks named like their images"""
    mask_kind: Literal["instances", "classes"] = "instances"
    """what the values of those masks number"""
    channels: Literal[1, 3] = 1
    """3 keeps colour"""
    level: Literal["image", "roi"] = "image"
    """whole images, or squares around their findings"""
    margin: float = 0.0
    """added on each side of such a square, in parts of its side"""
    disjoint: bool = False
    """patients in both official splits go to test"""
    dicom: DicomOptions = field(default_factory=DicomOptions)

    def only(self, source: str, *supported: str) -> None:
        """Refuse what this source cannot do.

        Raises:
            UserError: an option outside of `supported` was given.
        """
        for option in fields(self):
            if option.name not in supported and getattr(self, option.name) != getattr(SourceOptions(), option.name):
                raise UserError(f"the source {source} knows no --{option.name.replace('_', '-')}; leave it out")


@dataclass(frozen=True, kw_only=True)
class Archive:
    """What a source hands over: its records, and how they want to be treated."""

    dataset: str
    licence: str
    records: Sequence[Record]
    breast: bool = True  # isolate the breast; off for images of something else
    quarantine: bool = True  # leave out images with what looks like text on the breast
    channels: int = 1
    notes: tuple[str, ...] = ()  # what the user should know before trusting it
    absent: Sequence[str] = ()  # images that a table lists and the disk lacks; names for the user's own screen
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the source, kept in the manifest; no ids

    def leaks(self) -> Iterator[str]:
        """That patients are in more than one of the archive's own splits, if they are."""
        sides: dict[str, set[str]] = {}
        for record in self.records:
            sides.setdefault(record.patient_id, set()).update({record.split} - {""})
        if count := sum(len(splits) > 1 for splits in sides.values()):
            yield f"{count} patients are in more than one split, which stages refuse: see `miram data split`"
