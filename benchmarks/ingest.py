"""Images a second and core that `miram data ingest` makes of DICOM files, beside bare decoding of the same files.

python benchmarks/ingest.py [--images 12] [--rows 3000]

Phantoms of 12 bits at native size, written as uncompressed, RLE and deflated DICOM. The peer is pydicom's own
`pixel_array` and nothing else: what no ingest can be faster than. One process, one thread. There is no goal but that
the steps add up; the table says where the time goes.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pydicom
import webdataset  # before the clock starts: it imports torch  # noqa: F401
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, RLELossless, generate_uid

from miram.data import breast, ingest, reading
from miram.data.archive import SourceOptions
from miram.data.phantom import PhantomSettings, records
from miram.data.sources import read_archive

SYNTAXES = {"uncompressed": ExplicitVRLittleEndian, "RLE": RLELossless, "deflated": DeflatedExplicitVRLittleEndian}
FOR_PRESENTATION = "1.2.840.10008.5.1.4.1.1.1.2"


def write(path: Path, pixels: np.ndarray, number: int, syntax: UID) -> None:
    """A mammogram as DICOM."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file = FileDataset(path, {}, file_meta=meta, preamble=b"\0" * 128)
    file.SOPClassUID, file.SOPInstanceUID = FOR_PRESENTATION, generate_uid(entropy_srcs=[str(number)])
    file.Modality, file.PatientID, file.ImageLaterality, file.ViewPosition = "MG", str(number // 4), "L", "CC"
    file.PresentationIntentType, file.PhotometricInterpretation = "FOR PRESENTATION", "MONOCHROME2"
    file.SamplesPerPixel, file.BitsAllocated, file.BitsStored, file.HighBit, file.PixelRepresentation = 1, 16, 12, 11, 0
    file.Rows, file.Columns = pixels.shape
    file.PixelData = pixels.astype("<u2").tobytes()
    if syntax == RLELossless:
        file.compress(syntax)
    meta.TransferSyntaxUID = syntax
    file.save_as(path, enforce_file_format=True)


class Clock:
    """Seconds spent in functions, by name."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}

    def timed(self, name: str, function: Callable[..., object]) -> Callable[..., object]:
        """The function, its time added up."""

        def run(*arguments: object, **options: object) -> object:
            start = time.process_time()
            try:
                return function(*arguments, **options)
            finally:
                self.spent[name] = self.spent.get(name, 0.0) + time.process_time() - start

        return run


@contextmanager
def watched(clock: Clock) -> Iterator[None]:
    """The steps of ingest with a clock on each."""
    steps = {"breast": (breast, "find_breast"), "text on it": (ingest, "text_on"), "phash": (ingest, "phash")}
    steps |= {"PNG": (ingest, "encode_png"), "read DICOM": (reading, "read_dicom")}
    patches = [patch.object(m, name, clock.timed(step, getattr(m, name))) for step, (m, name) in steps.items()]
    for one in patches:
        one.start()
    try:
        yield
    finally:
        for one in patches:
            one.stop()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--rows", type=int, default=3000)
    asked = parser.parse_args()
    films = [r.read() for r in records(-(-asked.images // 4), PhantomSettings(size=asked.rows))][: asked.images]
    print(f"{platform.machine()}, {os.cpu_count()} cores, one in use; {len(films)} images of {films[0].pixels.shape}")
    with tempfile.TemporaryDirectory() as place:
        for name, syntax in SYNTAXES.items():
            race(name, syntax, Path(place) / name.replace(" ", ""), [film.pixels for film in films])


def race(name: str, syntax: UID, folder: Path, films: list[np.ndarray]) -> None:
    """One transfer syntax: bare decode, ingest, and the steps of it."""
    (folder / "dicom").mkdir(parents=True)
    for i, pixels in enumerate(films):
        write(folder / "dicom" / f"{i}.dcm", pixels, i, syntax)
    start = time.process_time()
    for path in sorted((folder / "dicom").iterdir()):
        assert pydicom.dcmread(path).pixel_array.any()
    bare = time.process_time() - start
    clock, archive = Clock(), read_archive("folder", folder / "dicom", SourceOptions())
    with watched(clock):
        start = time.process_time()
        outcome = ingest.ingest(archive, folder / "out", b"benchmark benchmark", workers=1)
        whole = time.process_time() - start
    assert outcome.samples == len(films), outcome.skipped
    steps = ", ".join(f"{step} {1e3 * t / len(films):.0f}" for step, t in clock.spent.items())
    print(
        f"{name}: bare decode {len(films) / bare:.1f} images/s, ingest {len(films) / whole:.2f} images/s and core "
        f"({bare / whole:.2f} of bare); ms an image: {steps}, all {1e3 * whole / len(films):.0f}"
    )


if __name__ == "__main__":
    main()
