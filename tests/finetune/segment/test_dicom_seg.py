"""DICOM-SEG beside mammograms, with and without what their headers often lack, read back by highdicom and pydicom."""

from __future__ import annotations

import builtins
import os
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from dicoms import mammogram, save, write_dicom
from numpy.typing import NDArray
from PIL import Image
from pydicom.pixels import pixel_array

from miram.engine.errors import UserError
from miram.finetune.segment.dicom_seg import encode_seg, highdicom, refuse_source

hd = pytest.importorskip("highdicom")
LESION = ("background", "lesion")
PLANE = {"PixelSpacing": [0.07, 0.07], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "ImagePositionPatient": [0, 0, 0]}


def image(rows: int = 133, columns: int = 101) -> NDArray[np.uint16]:
    """Sides that eight does not divide: bits of rows run on."""
    return np.random.default_rng(0).integers(0, 4096, (rows, columns)).astype(np.uint16)


def mask(shape: tuple[int, ...] = (133, 101), classes: int = 1) -> NDArray[np.uint8]:
    said = np.zeros(shape, np.uint8)
    for number in range(1, classes + 1):
        said[10 * number : 10 * number + 7, 13 : 13 + 20 * number] = number
    said[-1, -1] = 1
    return said


def written(path: Path, said: NDArray[np.uint8], classes: tuple[str, ...] = LESION) -> Path:
    refuse_source(path, classes)
    out = path.with_suffix(".seg.dcm")
    out.write_bytes(encode_seg(path, said, classes, "m" * 64))
    return out


@pytest.mark.parametrize(
    "tags",
    [
        {},
        {"FrameOfReferenceUID": "1.2.826.0.1.3680043.8.498.77"},
        {"FrameOfReferenceUID": "1.2.826.0.1.3680043.8.498.77", **PLANE},
        PLANE,
        {"PatientID": None, "PatientName": None},
        {"syntax": "j2k"},
        {"syntax": "implicit"},
        {"syntax": "big"},
        {"syntax": "deflated"},
        {"SpecificCharacterSet": "ISO_IR 192", "PatientName": "Müller^Jörg"},
    ],
    ids=lambda tags: ", ".join(map(str, tags)) or "plain",
)
def test_pixels_come_back_and_point_at_their_image(tags: dict[str, Any], tmp_path: Path) -> None:
    source = write_dicom(tmp_path / "film.dcm", image(), **tags)
    out = written(source, mask())
    seg, header = hd.seg.segread(out), pydicom.dcmread(source)
    read = seg.get_pixels_by_source_instance([header.SOPInstanceUID], segment_numbers=[1])
    assert np.array_equal(read[0, ..., 0], mask())
    plain = pydicom.dcmread(out)
    assert np.array_equal(pixel_array(plain), mask())
    assert plain.SOPClassUID == pydicom.uid.SegmentationStorage
    assert (plain.SegmentationType, plain.Modality, plain.BitsAllocated) == ("BINARY", "SEG", 1)
    (referred,) = plain.ReferencedSeriesSequence
    assert referred.SeriesInstanceUID == header.SeriesInstanceUID
    assert referred.ReferencedInstanceSequence[0].ReferencedSOPInstanceUID == header.SOPInstanceUID
    assert plain.StudyInstanceUID == header.StudyInstanceUID
    assert plain.SeriesInstanceUID != header.SeriesInstanceUID
    assert plain.get("FrameOfReferenceUID") == header.get("FrameOfReferenceUID")
    for keyword in ("PatientID", "PatientName"):
        assert str(plain.get(keyword) or "") == str(header.get(keyword) or "")


def test_every_class_is_a_frame_and_one_that_was_not_said_is_empty(tmp_path: Path) -> None:
    classes, said = ("background", "fat", "gland", "a\\pectoral " + 70 * "x"), mask(classes=2)
    seg = hd.seg.segread(written(write_dicom(tmp_path / "film.dcm", image()), said, classes))
    assert seg.number_of_segments == seg.NumberOfFrames == 3
    frames = seg.get_pixels_by_source_instance(["1.2.826.0.1.3680043.8.498.1"])[0]
    for number in (1, 2, 3):
        assert np.array_equal(frames[..., number - 1], said == number)
        described = seg.get_segment_description(number)
        assert described.segment_label == classes[number].replace("\\", "/")[:64]
        assert described.segmented_property_type.meaning == described.segment_label
    empty = hd.seg.segread(written(write_dicom(tmp_path / "other.dcm", image()), 0 * said))
    assert not empty.pixel_array.any()
    assert empty.get_segment_description(1).segmented_property_type == hd.sr.CodedConcept("52988006", "SCT", "Lesion")


def test_each_file_has_a_name_of_its_own(tmp_path: Path) -> None:
    source = write_dicom(tmp_path / "film.dcm", image())
    uids = {pydicom.dcmread(written(source, mask())).SOPInstanceUID for _ in range(2)}
    assert len(uids) == 2


def test_what_no_segmentation_can_refer_to_is_refused_with_the_reason(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "film.png")
    with pytest.raises(UserError, match=r"film\.png is no DICOM file"):
        refuse_source(tmp_path / "film.png", LESION)
    nameless = write_dicom(tmp_path / "nameless.dcm", image(), SOPInstanceUID=None, StudyInstanceUID=None)
    with pytest.raises(UserError, match="has no SOPInstanceUID, StudyInstanceUID"):
        refuse_source(nameless, LESION)
    slices = write_dicom(tmp_path / "ct.dcm", image(), SOPClassUID=pydicom.uid.CTImageStorage)
    with pytest.raises(UserError, match="needs a FrameOfReferenceUID"):
        refuse_source(slices, LESION)
    private = write_dicom(tmp_path / "private.dcm", image(), SOPClassUID="1.2.840.99999.1", PatientName="Secret^Jane")
    with pytest.raises(UserError, match="no DICOM-SEG can be made of its header") as caught:
        refuse_source(private, LESION)
    assert "Secret" not in str(caught.value)
    header = mammogram(image())
    header.preamble = b"\0" * 128
    (tmp_path / "cut.dcm").write_bytes(save(tmp_path / "whole.dcm", header).read_bytes()[:300])
    with pytest.raises(UserError, match=r"cut\.dcm"):
        refuse_source(tmp_path / "cut.dcm", LESION)


def test_without_highdicom_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, usual = write_dicom(tmp_path / "film.dcm", image()), builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("highdicom"):
            raise ImportError(name)
        return usual(name, *args, **kwargs)

    highdicom.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'miram\[dicom-seg\]'"):
        refuse_source(source, LESION)


@pytest.mark.skipif("MIRAM_REAL_DATA" not in os.environ, reason="real films are not at hand")
@pytest.mark.parametrize("name", ["MG1_J2KI", "OutOfBoundsOverlay.dcm"])
def test_real_films_take_a_segmentation(name: str, tmp_path: Path) -> None:
    source = Path(os.environ["MIRAM_REAL_DATA"], "mg_dicom", name)
    header = pydicom.dcmread(source, stop_before_pixels=True)
    said = mask((header.Rows, header.Columns))
    refuse_source(source, LESION)
    out = tmp_path / "out.dcm"
    out.write_bytes(encode_seg(source, said, LESION, "m" * 64))
    assert np.array_equal(hd.seg.segread(out).pixel_array, said)
    assert out.stat().st_size < said.size / 8 + 20_000
