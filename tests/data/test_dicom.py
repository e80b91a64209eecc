"""DICOM: every syntax exact, greys as the standard's formulas give them, and refusals instead of surprises."""

from __future__ import annotations

import os
import random
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dicoms import CANARIES, NEAR, SYNTAXES, lut, mammogram, plant, save, write_dicom
from numpy.typing import NDArray
from pydicom import dcmread, uid
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.sequence import Sequence

from miram.data.dicom import decoder as dicom_decoder
from miram.data.dicom.reader import DicomOptions, is_dicom, read_dicom, read_header
from miram.data.image import UnreadableImage
from miram.data.record import Film

REAL = Path(os.environ.get("MIRAM_REAL_DATA", "nowhere")) / "mg_dicom"
real = pytest.mark.skipif(not REAL.is_dir(), reason="MIRAM_REAL_DATA names no folder with mg_dicom")

RNG = np.random.default_rng(0)
Y, X = np.mgrid[:96, :80]
BREAST = (np.hypot(Y - 48, X) * 40 + RNG.normal(0, 9, Y.shape)).clip(0, 4095).astype(np.uint16)
CODES = np.arange(4096, dtype=np.uint16).reshape(64, 64)
LEVELS = np.arange(65536, dtype=np.uint16).reshape(256, 256)
LOSSLESS = sorted(set(SYNTAXES) - {"jpeg", "jpeg-ls-near", "j2k-lossy"})


@pytest.fixture
def film(tmp_path: Path) -> Callable[..., Film]:
    """Writes pixels and tags, reads them back."""

    def read(pixels: NDArray[Any], options: DicomOptions | None = None, **tags: Any) -> Film:
        return read_dicom(write_dicom(tmp_path / "film.dcm", pixels, **tags), options or DicomOptions())

    return read


def refused(film: Callable[..., Film], match: str, pixels: NDArray[Any] = CODES, **tags: Any) -> None:
    with pytest.raises(UnreadableImage, match=match):
        film(pixels, **tags)


# Transfer syntaxes


@pytest.mark.parametrize("syntax", LOSSLESS)
def test_12_bits_survive_every_lossless_syntax(film: Callable[..., Film], syntax: str) -> None:
    found = film(BREAST, syntax=syntax)
    np.testing.assert_array_equal(found.pixels, BREAST)
    assert (found.pixels.dtype, found.max_value, found.facts["voi"]) == (np.uint16, 4095, "none")


@pytest.mark.parametrize("syntax", LOSSLESS)
def test_8_bits_survive_every_lossless_syntax(film: Callable[..., Film], syntax: str) -> None:
    found = film((BREAST >> 4).astype(np.uint8)[:, :79], syntax=syntax)
    np.testing.assert_array_equal(found.pixels, (BREAST >> 4)[:, :79])
    assert (found.pixels.dtype, found.max_value) == (np.uint8, 255)


@pytest.mark.parametrize("syntax", LOSSLESS)
def test_a_16_bit_ramp_survives_every_lossless_syntax(film: Callable[..., Film], syntax: str) -> None:
    found = film(LEVELS, syntax=syntax, BitsStored=16)
    np.testing.assert_array_equal(found.pixels, LEVELS)
    assert found.max_value == 65535


@pytest.mark.parametrize("syntax", LOSSLESS)
def test_signed_values_keep_their_order_and_distance(film: Callable[..., Film], syntax: str) -> None:
    found = film(BREAST.astype(np.int16) - 2048, syntax=syntax)
    np.testing.assert_array_equal(found.pixels, BREAST)


@pytest.mark.parametrize(("syntax", "bound"), [("jpeg", 3), ("jpeg-ls-near", NEAR), ("j2k-lossy", 120)])
def test_lossy_syntaxes_stay_within_their_loss(film: Callable[..., Film], syntax: str, bound: int) -> None:
    """Near lossless may go beyond the range by its loss; that must not wrap from white to black."""
    pixels = (BREAST >> 4).astype(np.uint8) if syntax == "jpeg" else BREAST
    found = film(pixels, syntax=syntax)
    assert np.abs(found.pixels.astype(int) - pixels).max() <= bound
    assert found.max_value == int(found.pixels.dtype == np.uint8 and 255) or 4095


def test_a_file_without_a_preamble_is_known_and_read(tmp_path: Path) -> None:
    for syntax in ("implicit", "explicit", "big"):
        whole = write_dicom(tmp_path / "whole.dcm", BREAST, syntax=syntax)
        group_2 = 144 + int.from_bytes(whole.read_bytes()[140:144], "little")
        for start in (132, group_2):
            bare = tmp_path / "bare.dcm"
            bare.write_bytes(whole.read_bytes()[start:])
            assert is_dicom(bare)
            np.testing.assert_array_equal(read_dicom(bare, DicomOptions()).pixels, BREAST)


def test_other_files_are_no_dicom(tmp_path: Path) -> None:
    assert is_dicom(write_dicom(tmp_path / "a.dcm", CODES))
    others = [b"", b"II*\0", b"P5 3 3 255\n" + bytes(200), b"\x89PNG" + bytes(300), b"\10\0" * 4]
    for number, content in enumerate(others):
        (tmp_path / str(number)).write_bytes(content)
        assert not is_dicom(tmp_path / str(number))
    assert not is_dicom(tmp_path)
    assert not is_dicom(tmp_path / "missing")


def test_bits_beside_the_stored_ones_do_not_count(film: Callable[..., Film]) -> None:
    """Old overlays lie above them, left-aligned writers put nothing below."""
    np.testing.assert_array_equal(film(CODES | 0xA000).pixels, CODES)
    np.testing.assert_array_equal(film(CODES << 4, HighBit=15).pixels, CODES)


def test_what_the_decoder_process_does_not_survive_is_a_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_dicom(tmp_path / "a.dcm", BREAST, syntax="jpeg-lossless")
    read_dicom(path, DicomOptions())
    assert dicom_decoder.decoder._child
    dicom_decoder.decoder._child.kill()  # as the file before may have done: this one is not to blame
    np.testing.assert_array_equal(read_dicom(path, DicomOptions()).pixels, BREAST)
    assert dicom_decoder.decoder._child
    dicom_decoder.decoder._child.send_signal(signal.SIGSTOP)  # it hangs
    monkeypatch.setattr(dicom_decoder, "PATIENCE", 0.02)
    with pytest.raises(UnreadableImage, match="took longer"):
        read_dicom(path, DicomOptions())
    monkeypatch.undo()
    np.testing.assert_array_equal(read_dicom(path, DicomOptions()).pixels, BREAST)


def test_an_interrupted_answer_is_not_the_next_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    first = write_dicom(tmp_path / "a.dcm", BREAST, syntax="jpeg-lossless")
    second = write_dicom(tmp_path / "b.dcm", 4095 - BREAST, syntax="jpeg-lossless")
    monkeypatch.setattr(dicom_decoder.json, "loads", interrupted)
    with pytest.raises(KeyboardInterrupt):
        read_dicom(first, DicomOptions())
    monkeypatch.undo()
    np.testing.assert_array_equal(read_dicom(second, DicomOptions()).pixels, 4095 - BREAST)


def test_the_decoder_process_ends_with_its_parent(tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "a.dcm", BREAST, syntax="jpeg-lossless")
    code = (
        "import sys, pathlib; from miram.data.dicom import reader as dicom, decoder as dicom_decoder\n"
        "dicom.read_dicom(pathlib.Path(sys.argv[1]), dicom.DicomOptions()); print(dicom_decoder.decoder._child.pid)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)


# Greys


def linear(x: float, c: float, w: float, top: int) -> float:
    """PS3.3 C.11.2.1.2.1, word for word."""
    if x <= c - 0.5 - (w - 1) / 2:
        return 0
    if x > c - 0.5 + (w - 1) / 2:
        return top
    return ((x - (c - 0.5)) / (w - 1) + 0.5) * top


def linear_exact(x: float, c: float, w: float, top: int) -> float:
    """PS3.3 C.11.2.1.3.2."""
    if x <= c - w / 2:
        return 0
    return top if x > c + w / 2 else ((x - c) / w + 0.5) * top


def sigmoid(x: float, c: float, w: float, top: int) -> float:
    """PS3.3 C.11.2.1.3.1."""
    return float(top / (1 + np.exp(-4 * (x - c) / w)))


@pytest.mark.parametrize("window", [(2048, 4096), (1000, 500), (300.5, 1), (0, 2), (4000, 9000.5), (700, 33.3)])
@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID", None])
def test_windows_follow_the_formulas_of_the_standard(
    film: Callable[..., Film], function: str | None, window: tuple[float, float]
) -> None:
    found = film(CODES, WindowCenter=window[0], WindowWidth=window[1], VOILUTFunction=function)
    formula = {"LINEAR_EXACT": linear_exact, "SIGMOID": sigmoid}.get(function or "", linear)
    with np.errstate(over="ignore"):
        expected = [formula(float(x), *window, found.max_value) for x in CODES.ravel()]
    assert np.abs(found.pixels.ravel() - np.array(expected)).max() <= 0.5 + 1e-6
    assert (found.max_value in (4095, 65535), found.facts["voi"]) == (True, "window")


@pytest.mark.parametrize(
    ("bits", "window", "function", "levels", "max_value"),
    [
        (10, (2048, 4096), "LINEAR", 1024, 65535),
        (12, (32768, 65536), "LINEAR", 4096, 65535),
        (12, (8192, 16384), "LINEAR_EXACT", 4096, 65535),
        (14, (32767, 65535), "LINEAR", 16384, 65535),
        (8, (512, 1024), "LINEAR", 256, 65535),
        (12, (2048, 4096), "LINEAR", 4096, 4095),
        (12, (1000, 2000), "LINEAR", 2000, 4095),  # narrower than the codes: each in the window has a level
    ],
)
def test_a_wide_window_costs_no_grey_levels(
    film: Callable[..., Film], bits: int, window: tuple[float, float], function: str, levels: int, max_value: int
) -> None:
    codes = np.arange(1 << bits, dtype=np.uint8 if bits == 8 else np.uint16)
    pixels = np.resize(codes, (max(codes.size, 4096) // 64, 64))
    tags = {"WindowCenter": window[0], "WindowWidth": window[1], "VOILUTFunction": function}
    for inverse in (None, "INVERSE"):
        found = film(pixels, **tags, BitsStored=bits, PresentationLUTShape=inverse)
        assert (np.unique(found.pixels).size, found.max_value) == (levels, max_value)


def test_a_steep_sigmoid_keeps_what_16_bits_can(film: Callable[..., Film]) -> None:
    found = film(CODES, WindowCenter=2000, WindowWidth=600, VOILUTFunction="SIGMOID")
    expected = {round(sigmoid(float(x), 2000, 600, 65535)) for x in range(4096)}
    assert found.max_value == 65535
    assert np.unique(found.pixels).size == len(expected) > 1281  # the levels that 12 bits keep


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("rescale", [(None, None), (2, -1000), (0.5, 7.25)])
def test_windows_agree_with_pydicom(
    tmp_path: Path, function: str, signed: bool, rescale: tuple[float | None, float | None]
) -> None:
    pixels = CODES.astype(np.int16) - 2048 if signed else CODES
    tags = {"WindowCenter": [500, 9], "WindowWidth": [3000, 77.7], "VOILUTFunction": function}
    path = write_dicom(tmp_path / "a.dcm", pixels, RescaleSlope=rescale[0], RescaleIntercept=rescale[1], **tags)
    header = dcmread(path)
    slope = 1.0 if rescale[0] is None else float(rescale[0])
    for index in (0, 1):
        theirs = apply_voi_lut(apply_modality_lut(header.pixel_array, header), header, index=index)
        # Theirs spans what the modality's units can be, ours 0 to the largest value.
        low = slope * (-2048 if signed else 0) + float(rescale[1] or 0)
        ours = read_dicom(path, DicomOptions(voi_index=index))
        assert np.abs(ours.pixels - (theirs - low) / slope / 4095 * ours.max_value).max() <= 0.51


def test_a_falling_rescale_turns_the_window_round(film: Callable[..., Film]) -> None:
    found = film(CODES, RescaleSlope=-2, RescaleIntercept=8000, WindowCenter=4000, WindowWidth=3000)
    expected = [linear(8000 - 2.0 * float(x), 4000, 3000, 4095) for x in CODES.ravel()]
    assert np.abs(found.pixels.ravel() - np.array(expected)).max() <= 0.5 + 1e-6


def test_the_lookup_table_comes_before_the_window(film: Callable[..., Film]) -> None:
    table = (np.arange(3000)[::-1] + 500).astype(np.uint16)
    tags: dict[str, Any] = {"WindowCenter": 1000, "WindowWidth": 500, "VOILUTSequence": [lut(table, 200, 14)]}
    found = film(CODES, **tags)
    np.testing.assert_array_equal(found.pixels, table[(CODES.astype(int) - 200).clip(0, 2999)])
    assert (found.max_value, found.facts["voi"]) == (2**14 - 1, "lut")
    plain = film(CODES, WindowCenter=1000, WindowWidth=500)
    np.testing.assert_array_equal(film(CODES, DicomOptions(voi="window"), **tags).pixels, plain.pixels)
    np.testing.assert_array_equal(film(CODES, DicomOptions(voi="none"), **tags).pixels, CODES)


@pytest.mark.parametrize("syntax", ["implicit", "explicit", "big", "deflated"])
def test_lookup_tables_agree_with_pydicom_in_every_encoding(tmp_path: Path, syntax: str) -> None:
    tables = [lut((4095 - np.arange(4096)).astype(np.uint16), 0, 12), lut(np.arange(2000) // 2, -3, 10)]
    path = write_dicom(tmp_path / "a.dcm", CODES.astype(np.int16) - 900, syntax=syntax, VOILUTSequence=tables)
    header = dcmread(path)
    for index in (0, 1, 5):
        expected = apply_voi_lut(header.pixel_array, header, index=index % 5)  # the first where there are fewer
        np.testing.assert_array_equal(read_dicom(path, DicomOptions(voi_index=index)).pixels, expected)


def test_a_table_of_65536_entries_and_one_of_8_bits(film: Callable[..., Film]) -> None:
    whole = lut((65535 - np.arange(65536)).astype(np.uint16), 0, 16)
    np.testing.assert_array_equal(film(LEVELS, BitsStored=16, VOILUTSequence=[whole]).pixels, 65535 - LEVELS)
    small = film(CODES, VOILUTSequence=[lut(np.arange(4096) >> 4, 0, 8)])
    np.testing.assert_array_equal(small.pixels, CODES >> 4)
    assert (small.pixels.dtype, small.max_value) == (np.uint8, 255)


def test_a_modality_table_is_applied_before_the_window(film: Callable[..., Film]) -> None:
    table = (np.arange(4096) * 3 + 7).astype(np.uint16)
    found = film(CODES, ModalityLUTSequence=[lut(table, 0, 14)])
    np.testing.assert_array_equal(found.pixels, table[CODES])
    assert found.max_value == 2**14 - 1
    both = film(CODES, ModalityLUTSequence=[lut(table, 0, 14)], WindowCenter=6000, WindowWidth=5000)
    expected = [linear(float(x), 6000, 5000, 4095) for x in table[CODES].ravel()]
    assert np.abs(both.pixels.ravel() - np.array(expected)).max() <= 0.5 + 1e-6


@pytest.mark.parametrize(("slope", "intercept"), [(1, 0), (2.5, -1000), (0.001, 3), (1e9, -1e12)])
def test_without_voi_the_stored_integers_survive_any_rescale(
    film: Callable[..., Film], slope: float, intercept: float
) -> None:
    found = film(CODES, RescaleSlope=slope, RescaleIntercept=intercept)
    np.testing.assert_array_equal(found.pixels, CODES)
    turned = film(CODES, RescaleSlope=-slope, RescaleIntercept=intercept)
    np.testing.assert_array_equal(turned.pixels, 4095 - CODES)


@pytest.mark.parametrize(
    ("photometric", "shape", "inverted"),
    [
        ("MONOCHROME2", "IDENTITY", False),
        ("MONOCHROME2", "INVERSE", True),
        ("MONOCHROME1", "INVERSE", True),
        ("MONOCHROME1", "IDENTITY", True),
        ("MONOCHROME1", None, True),
        ("MONOCHROME2", None, False),
    ],
)
def test_inverted_once_and_after_the_window(
    film: Callable[..., Film], photometric: str, shape: str | None, inverted: bool
) -> None:
    tags = {"PhotometricInterpretation": photometric, "PresentationLUTShape": shape}
    np.testing.assert_array_equal(film(CODES, **tags).pixels, 4095 - CODES if inverted else CODES)
    window = {"WindowCenter": 1000, "WindowWidth": 500}
    plain = film(CODES, **window).pixels
    np.testing.assert_array_equal(film(CODES, **window, **tags).pixels, 4095 - plain if inverted else plain)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("window", [{}, {"WindowCenter": 2000, "WindowWidth": 300, "VOILUTFunction": "SIGMOID"}])
@pytest.mark.parametrize(("value", "limit"), [(0, None), (0, 30), (4095, None), (4095, 4000), (30, 0)])
def test_padding_is_darkest_whatever_the_rest(
    film: Callable[..., Film], photometric: str, window: dict[str, Any], value: int, limit: int | None
) -> None:
    tags = {"PhotometricInterpretation": photometric, "PresentationLUTShape": None, **window}
    found = film(CODES, PixelPaddingValue=value, PixelPaddingRangeLimit=limit, **tags)
    ends = sorted((value, value if limit is None else limit))
    padding = (ends[0] <= CODES) & (ends[1] >= CODES)
    assert not found.pixels[padding].any()
    np.testing.assert_array_equal(found.pixels[~padding], film(CODES, **tags).pixels[~padding])


@pytest.mark.parametrize(("bits", "top"), [(16, 32767), (13, 4095), (12, 2047)])
@pytest.mark.parametrize("slope", [None, 2, -0.5])
def test_signed_pixels_that_are_never_negative_keep_their_integers(
    film: Callable[..., Film], bits: int, top: int, slope: float | None
) -> None:
    """Half of the range is not theirs: black would be grey, and no breast be found in it."""
    pixels = np.minimum(CODES, top).astype(np.int16)
    found = film(pixels, BitsStored=bits, RescaleSlope=slope, RescaleIntercept=slope and -7)
    np.testing.assert_array_equal(found.pixels, top - pixels if slope == -0.5 else pixels)
    assert found.max_value == top
    inverted = film(pixels, BitsStored=bits, PhotometricInterpretation="MONOCHROME1", PresentationLUTShape=None)
    np.testing.assert_array_equal(inverted.pixels, top - pixels)
    padded = film(pixels, BitsStored=bits, PixelPaddingValue=-5, PixelPaddingRangeLimit=9)
    np.testing.assert_array_equal(padded.pixels, np.where(pixels <= 9, 0, pixels))
    negative = pixels.copy()
    negative[0, 0] = -1
    below = film(negative, BitsStored=bits)
    np.testing.assert_array_equal(below.pixels, negative.astype(int) + top + 1)
    assert below.max_value == 2 * top + 1


def test_a_window_on_signed_pixels_does_not_depend_on_their_signs(film: Callable[..., Film]) -> None:
    pixels = np.minimum(CODES, 2047).astype(np.int16)
    tags = {"WindowCenter": 500, "WindowWidth": 900}
    negative = pixels.copy()
    negative[0, 0] = -1
    np.testing.assert_array_equal(film(pixels, **tags).pixels[1:], film(negative, **tags).pixels[1:])


def test_padding_of_signed_pixels(film: Callable[..., Film]) -> None:
    pixels = CODES.astype(np.int16) - 2048
    assert not film(pixels, PixelPaddingValue=-2000).pixels[pixels == -2000].any()
    assert film(pixels, PixelPaddingValue=-2000).pixels[pixels == -1999] == 49


def test_a_16_bit_ramp_survives_inversion_and_an_identity_window(film: Callable[..., Film]) -> None:
    tags = {"BitsStored": 16, "WindowCenter": 32768, "WindowWidth": 65536}
    np.testing.assert_array_equal(film(LEVELS, **tags).pixels, LEVELS)
    np.testing.assert_array_equal(film(LEVELS, PresentationLUTShape="INVERSE", **tags).pixels, 65535 - LEVELS)


# Refusals


@pytest.mark.parametrize(
    ("tags", "match", "flag"),
    [
        ({"Modality": "RG"}, "modality", "any_modality"),
        ({"Modality": None}, "modality", "any_modality"),
        ({"PresentationIntentType": "FOR PROCESSING"}, "raw", "for_processing"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.1.2.1"}, "raw", "for_processing"),
        ({"ImageType": ["DERIVED", "SECONDARY"]}, "secondary", "any_modality"),
        ({"ImageType": ["DERIVED", "PRIMARY", "SCREEN SAVE"]}, "screen", None),
        ({"ImageType": ["DERIVED", "PRIMARY", "TOMOSYNTHESIS", "GENERATED_2D"]}, "tomosynthesis", None),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.13.1.3"}, "tomosynthesis", None),
        ({"NumberOfFrames": 2}, "several frames", None),
        ({"QualityControlImage": "YES"}, "quality", None),
        ({"CalibrationImage": "YES"}, "quality", None),
        ({"SamplesPerPixel": 3}, "colour", None),
        ({"PhotometricInterpretation": "RGB"}, "colour", None),
        ({"PhotometricInterpretation": None}, "colour", None),
        ({"BurnedInAnnotation": "YES"}, "^quarantined", "burned_in"),
    ],
)
def test_images_that_are_no_mammograms_are_left_out(
    film: Callable[..., Film], tags: dict[str, Any], match: str, flag: str | None
) -> None:
    refused(film, match, **tags)
    if flag:
        np.testing.assert_array_equal(film(CODES, DicomOptions(**{flag: True}), **tags).pixels, CODES)


def test_implants_are_left_out_only_where_asked(film: Callable[..., Film]) -> None:
    assert film(CODES, BreastImplantPresent="YES").max_value == 4095
    refused(film, "implant", options=DicomOptions(implants=False), BreastImplantPresent="YES")


@pytest.mark.parametrize(
    ("tags", "match"),
    [
        ({"WindowCenter": 5, "WindowWidth": 0}, "width"),
        ({"WindowCenter": 5, "WindowWidth": -3, "VOILUTFunction": "SIGMOID"}, "width"),
        ({"WindowCenter": 5, "WindowWidth": None}, "centre or a width"),
        ({"WindowCenter": [5, 6], "WindowWidth": 9}, "centre or a width"),
        ({"WindowCenter": 5, "WindowWidth": 9, "VOILUTFunction": "CUBIC"}, "function"),
        ({"RescaleSlope": 0}, "rescale"),
        ({"RescaleSlope": 1e307}, "rescale"),
        ({"BitsStored": 13, "HighBit": 11}, "bits"),
        ({"BitsStored": 17}, "bits"),
        ({"BitsStored": 4}, "bits"),
        ({"BitsStored": None}, "BitsStored"),
        ({"BitsAllocated": 32}, "bits"),
        ({"Rows": None}, "Rows"),
        ({"Rows": 0}, "too few"),
        ({"Columns": 63}, "too few"),
        ({"Rows": 65535, "Columns": 65535}, "more than"),
        ({"Rows": 128}, "pixels"),
        ({"Rows": 128, "Columns": 31}, "too few"),
        ({"Columns": 128}, "pixels"),
        ({"VOILUTSequence": [lut(np.arange(9), 0, 0)]}, "lookup table"),
        ({"VOILUTSequence": [Dataset()]}, "lookup table"),
    ],
)
def test_headers_that_make_no_sense_are_refused(film: Callable[..., Film], tags: dict[str, Any], match: str) -> None:
    refused(film, match, **tags)


@pytest.mark.parametrize("keyword", ["WindowCenter", "WindowWidth", "RescaleSlope", "RescaleIntercept"])
@pytest.mark.parametrize("value", [b"Doe ", b"nan ", b"1e999 ", b"1,5 "])
def test_numbers_that_are_none_are_named_by_keyword_alone(tmp_path: Path, keyword: str, value: bytes) -> None:
    tags = {"WindowCenter": 7007, "WindowWidth": 7007, "RescaleSlope": 1, "RescaleIntercept": 0, keyword: 7113}
    path = write_dicom(tmp_path / "a.dcm", CODES, **tags)
    path.write_bytes(path.read_bytes().replace(b"\x06\x007113.0", len(value).to_bytes(2, "little") + value))
    with pytest.raises(UnreadableImage, match=f"its {keyword} is not a number") as caught:
        read_dicom(path, DicomOptions())
    assert "Doe" not in str(caught.value)


def test_a_broken_window_does_not_matter_where_it_is_not_asked_for(film: Callable[..., Film]) -> None:
    broken = {"WindowCenter": 5, "WindowWidth": 0}
    np.testing.assert_array_equal(film(CODES, DicomOptions(voi="none"), **broken).pixels, CODES)


@pytest.mark.parametrize("syntax", sorted(SYNTAXES))
@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.98])
def test_truncated_files_are_refused(tmp_path: Path, syntax: str, kept: float) -> None:
    pixels = (BREAST >> 4).astype(np.uint8) if syntax == "jpeg" else BREAST
    path = write_dicom(tmp_path / "a.dcm", pixels, syntax=syntax)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(UnreadableImage) as caught:
        read_dicom(path, DicomOptions())
    assert str(tmp_path) not in str(caught.value)


def test_a_missing_file_is_refused_without_naming_its_folder(tmp_path: Path) -> None:
    for read in (read_header, lambda path: read_dicom(path, DicomOptions())):
        with pytest.raises(UnreadableImage) as caught:
            read(tmp_path / "missing.dcm")
        assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("syntax", ["jpeg-lossless", "jpeg-ls", "j2k", "rle"])
def test_a_stream_of_another_size_than_the_header_is_refused_before_it_is_decoded(tmp_path: Path, syntax: str) -> None:
    header = mammogram(LEVELS, syntax=syntax, BitsStored=16)
    header.Rows = header.Columns = 128
    with pytest.raises(UnreadableImage):
        read_dicom(save(tmp_path / "a.dcm", header), DicomOptions())


def test_a_j2k_bomb_takes_neither_time_nor_memory(tmp_path: Path) -> None:
    """A stream that claims 60000 x 60000 pixels, in a header that claims 256 x 256."""
    header = mammogram(LEVELS, syntax="j2k", BitsStored=16)
    stream = bytearray(get_frame(header.PixelData, 0, number_of_frames=1))
    stream[8:16] = (60000).to_bytes(4, "big") * 2
    header.PixelData = encapsulate([bytes(stream)])
    with pytest.raises(UnreadableImage, match="size"):
        read_dicom(save(tmp_path / "a.dcm", header), DicomOptions())


def test_an_rle_bomb_is_refused_by_its_length(tmp_path: Path) -> None:
    """Each pair of bytes makes 128: a frame of so many is far more than its header says."""
    header = mammogram(LEVELS.astype(np.uint8), syntax="rle")
    pairs = b"\x81\0" * 60_000
    header.PixelData = encapsulate([struct.pack("<16I", 1, 64, *[0] * 14) + pairs])
    with pytest.raises(UnreadableImage, match="size"):
        read_dicom(save(tmp_path / "a.dcm", header), DicomOptions())


def test_a_deflated_bomb_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 1 << 22)
    monkeypatch.setattr("miram.data.dicom.pixels.BESIDE", 1 << 23)
    header = mammogram(LEVELS, syntax="deflated", BitsStored=16)
    path = save(tmp_path / "a.dcm", header)
    assert read_dicom(path, DicomOptions()).max_value == 65535
    start = 144 + int.from_bytes(path.read_bytes()[140:144], "little")
    plain = zlib.decompress(path.read_bytes()[start:], -zlib.MAX_WBITS)
    blob = b"\x07\x00\x10\x00UN\0\0" + (1 << 26).to_bytes(4, "little") + bytes(1 << 26)  # before the pixels
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    path.write_bytes(path.read_bytes()[:start] + packer.compress(blob + plain) + packer.flush())
    with pytest.raises(UnreadableImage):
        read_dicom(path, DicomOptions())


def test_syntaxes_that_nothing_decodes_are_named_with_the_plugin_that_would(tmp_path: Path) -> None:
    header = mammogram(BREAST, syntax="jpeg-lossless")
    header.file_meta.TransferSyntaxUID = uid.HTJ2KLossless
    with pytest.raises(UnreadableImage, match=r"size than its header says|openjpeg"):
        read_dicom(save(tmp_path / "a.dcm", header), DicomOptions())
    header.file_meta.TransferSyntaxUID = uid.JPEGExtended12Bit
    with pytest.raises(UnreadableImage, match=r"JPEG Extended.*2\.4\.51.*pylibjpeg-libjpeg"):
        read_dicom(save(tmp_path / "a.dcm", header), DicomOptions())
    header.file_meta.TransferSyntaxUID = uid.UID("1.2.826.0.1.3680043.9.7777.1")
    with pytest.raises(UnreadableImage, match="not of the standard") as caught:
        read_dicom(save(tmp_path / "a.dcm", header), DicomOptions())
    assert "7777" not in str(caught.value)


# Headers, facts and privacy


@pytest.mark.parametrize(
    ("tags", "spacing"),
    [
        ({"ImagerPixelSpacing": [0.07, 0.07]}, 0.07),
        ({"PixelSpacing": [0.05, 0.05]}, 0.05),
        ({"EstimatedRadiographicMagnificationFactor": 1.4}, 0.05),
        ({"EstimatedRadiographicMagnificationFactor": 0}, 0.07),
        ({"EstimatedRadiographicMagnificationFactor": 80}, 0.07),
        ({"PixelSpacing": [0.05, 0.05], "EstimatedRadiographicMagnificationFactor": 1.5}, 0.05),
        ({"ImagerPixelSpacing": [0.07, 0.08]}, None),
        ({"ImagerPixelSpacing": [0.07, 0.0703]}, 0.07015),
        ({"ImagerPixelSpacing": [70, 70]}, None),
        ({"ImagerPixelSpacing": [0, 0]}, None),
        ({"ImagerPixelSpacing": [-0.07, -0.07]}, None),
        ({"ImagerPixelSpacing": None}, None),
        ({"ImagerPixelSpacing": None, "NominalScannedPixelSpacing": [0.05, 0.05]}, 0.05),
    ],
)
def test_spacing_is_believed_where_it_can_be(
    film: Callable[..., Film], tmp_path: Path, tags: dict[str, Any], spacing: float | None
) -> None:
    assert film(CODES, **tags).spacing_mm == pytest.approx(spacing)
    assert read_header(tmp_path / "film.dcm").spacing_mm == pytest.approx(spacing)
    assert read_dicom(tmp_path / "film.dcm", DicomOptions(), spacing_mm=0.2).spacing_mm == 0.2


def coded(value: str) -> Sequence:
    item = Dataset()
    item.CodeValue = value
    return Sequence([item])


@pytest.mark.parametrize(
    ("tags", "side", "view"),
    [
        ({}, "L", "CC"),
        ({"ImageLaterality": "R", "ViewPosition": "mlo"}, "R", "MLO"),
        ({"ImageLaterality": None, "Laterality": "R", "ViewPosition": None}, "R", ""),
        ({"ImageLaterality": "B", "ViewPosition": "Doe"}, "", ""),
        ({"ViewPosition": "", "ViewCodeSequence": coded("R-10226")}, "L", "MLO"),
        ({"ViewPosition": None, "ViewCodeSequence": coded("399260004")}, "L", "ML"),
    ],
)
def test_headers_tell_side_and_view(tmp_path: Path, tags: dict[str, Any], side: str, view: str) -> None:
    found = read_header(write_dicom(tmp_path / "a.dcm", CODES, **tags))
    assert (found.laterality, found.view) == (side, view)
    assert (found.patient_id, found.modality, found.rows, found.columns) == ("patient-1", "MG", 64, 64)
    assert (found.study_uid[-1], found.series_uid[-1], found.sop_uid[-1]) == ("2", "3", "1")


def test_a_header_without_an_image_is_a_header(tmp_path: Path) -> None:
    header = mammogram(CODES, Rows=None, Columns=None, Modality="SR")
    del header.PixelData
    found = read_header(save(tmp_path / "a.dcm", header))
    assert (found.rows, found.columns, found.modality) == (0, 0, "SR")


@pytest.mark.parametrize(
    ("name", "fact"),
    [
        *(("HOLOGIC, Inc.", "hologic"), ("Lorad, A Hologic Company", "hologic"), ("Dr Doe", "other"), (None, "")),
        *(("GE MEDICAL SYSTEMS", "ge"), ("GE", "ge"), ("GEMS", "ge"), ("General Electric", "ge"), ("GEHEIM", "other")),
        *(("MERGE Healthcare", "other"), ("VINTAGE Inc", "other"), ("Image Systems", "other"), ("SIMS Ltd", "other")),
        *(("FUJIFILM Corporation", "fuji"), ("IMS s.r.l.", "ims"), ("Philips Medical Systems", "philips")),
    ],
)
def test_facts_are_of_closed_lists(film: Callable[..., Film], name: str | None, fact: str) -> None:
    found = film(CODES, Manufacturer=name, PhotometricInterpretation="MONOCHROME1", WindowCenter=9, WindowWidth=9)
    expected = {"photometric": "MONOCHROME1", "presentation": "FOR PRESENTATION", "manufacturer": fact, "voi": "window"}
    assert found.facts == expected


def test_no_canary_leaves_the_file(tmp_path: Path) -> None:
    header = mammogram(CODES)
    planted = plant(header)
    assert len(CANARIES) > 300
    assert len(set(planted.values())) == len(planted) > len(CANARIES)
    path = save(tmp_path / "a.dcm", header)
    content = path.read_bytes()
    assert not [name for name, value in planted.items() if value.encode() not in content]
    found = read_dicom(path, DicomOptions())
    np.testing.assert_array_equal(found.pixels, CODES)
    told = repr(found.facts) + repr(found.spacing_mm)
    assert not [name for name, value in planted.items() if value in told]
    for keyword in ("Rows", "BitsStored", "PhotometricInterpretation", "PixelData", "Modality"):
        damaged = dcmread(path)
        delattr(damaged, keyword)
        with pytest.raises(UnreadableImage) as caught:
            read_dicom(save(path, damaged), DicomOptions())
        assert not [name for name, value in planted.items() if value in str(caught.value)]
        save(path, header)


# Damage


def mutated(sound: bytes, pixels_at: int, seed: str) -> bytes:
    """The file with bits flipped, bytes of header or pixels set, or a piece replaced or left out."""
    draw, content = random.Random(seed), bytearray(sound)
    kind = draw.randrange(4)
    for _ in range(draw.choice([1, 1, 2, 8, 30])):
        if kind == 0:
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        elif kind == 1:
            content[draw.randrange(pixels_at, min(len(content), pixels_at + 400))] = draw.randrange(256)
        elif kind == 2:
            content[draw.randrange(128, pixels_at)] = draw.choice([0, 255, 1, 128, draw.randrange(256)])
        elif len(content) > 600:
            place = draw.randrange(len(content) - 300)
            content[place : place + draw.randrange(1, 300)] = draw.randbytes(draw.choice([0, 4, 50]))
    return bytes(content)


@pytest.mark.parametrize("syntax", sorted(SYNTAXES))
def test_mutated_files_end_as_films_or_refusals(tmp_path: Path, syntax: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Forty a syntax, 480 in all. Several of them kill the process that decodes."""
    pixels = (BREAST >> 4).astype(np.uint8) if syntax == "jpeg" else BREAST
    tags = {
        "WindowCenter": [1000, 900],
        "WindowWidth": [2000, 800],
        "VOILUTSequence": [lut(np.arange(4096) // 2, 0, 12)],
    }
    path = write_dicom(tmp_path / "a.dcm", pixels, syntax=syntax, **tags)
    sound, started = path.read_bytes(), time.monotonic()
    outcomes: list[object] = []
    reasons: list[str] = []
    pixels_at = max(sound.rfind(b"\xe0\x7f\x10\x00"), 400)
    for number in range(40):
        path.write_bytes(mutated(sound, pixels_at, f"{syntax} {number}"))
        for read in (read_header, lambda path: read_dicom(path, DicomOptions())):
            try:
                outcomes.append(read(path))
            except UnreadableImage as refusal:
                reasons.append(str(refusal))
    assert len(reasons) > 5
    assert not [reason for reason in reasons if str(tmp_path) in reason]
    assert all(f.pixels.max() <= f.max_value for f in outcomes if isinstance(f, Film))
    assert time.monotonic() - started < 60
    assert capfd.readouterr().err == ""


# Real files


@real
def test_a_real_jpeg_lossless_file() -> None:
    path = REAL / "OutOfBoundsOverlay.dcm"
    found, header = read_dicom(path, DicomOptions()), read_header(path)
    np.testing.assert_array_equal(found.pixels, dcmread(path).pixel_array)  # its window is the identity
    assert (found.max_value, found.facts["voi"], header.laterality, header.view) == (4095, "window", "L", "CC")
    assert found.spacing_mm == pytest.approx(0.085 / 1.0433386837881)


@real
def test_a_real_jpeg_2000_film_needs_leave_as_its_modality_is_rg() -> None:
    path = REAL / "MG1_J2KI"
    with pytest.raises(UnreadableImage, match="modality"):
        read_dicom(path, DicomOptions())
    found = read_dicom(path, DicomOptions(any_modality=True, voi="none"))
    # The sum as Pillow and GDCM both decode it.
    assert (found.pixels.shape, int(found.pixels.sum(dtype=np.int64))) == ((4664, 3064), 23019715355)
    assert read_header(path).view == "MLO"


@real
def test_a_real_file_that_nothing_decodes_says_so() -> None:
    with pytest.raises(UnreadableImage, match=r"JPEG Extended.*1\.2\.840\.10008\.1\.2\.4\.51.*pylibjpeg-libjpeg"):
        read_dicom(REAL / "MG1_JPLY", DicomOptions(any_modality=True))
