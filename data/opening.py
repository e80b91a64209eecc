"""A data set as a stage wants it: by the `data` section of its configuration, refused where patients would leak."""

from __future__ import annotations

from .config import DataSection
from .shards import ShardDataset
from .splits import refuse_shared_patients


def open_shards(section: DataSection) -> ShardDataset:
    """The samples that a stage may use.

    Raises:
        UserError: the data or the split file is not usable, or a patient is in more than one split.
    """
    shards = ShardDataset(
        section.shards, section.split, section.cache_mb, split_file=section.split_file, fold=section.fold
    )
    if section.split is not None and section.split_file is None:
        refuse_shared_patients(shards.every.narrow("dataset", "patient", "split"), ", ".join(shards.roots))
    return shards
