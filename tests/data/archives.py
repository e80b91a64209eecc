"""Small copies of public archives in their own layout, as the tests of their sources write them."""

from __future__ import annotations

from pathlib import Path

import test_cbis
import test_cmmd

from miram.data.archive import Archive, SourceOptions
from miram.data.sources import read_archive


def cbis_archive(src: Path) -> Archive:
    """Films of CBIS-DDSM with whole, partial and no masks, below a folder of the collection's name."""
    test_cbis.write_tables(src / "tables")
    test_cbis.write_files(src)
    return read_archive("cbis-ddsm", src, SourceOptions(labels=src / "tables"))


def cmmd_archive(src: Path) -> Archive:
    """Two patients of CMMD, two views of each breast."""
    src.mkdir()
    (src / test_cmmd.TABLE).write_text(test_cmmd.HEADER + test_cmmd.ROWS)
    views = [(p, side, view) for p in ("D1-0001", "D2-0002") for side in "LR" for view in ("CC", "MLO")]
    for number, (patient, side, view) in enumerate(views):
        test_cmmd.write_image(src, patient, number, side, view)
    return read_archive("cmmd", src)
