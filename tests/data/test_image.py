"""Image files: every grey level survives, and what cannot be read says so without naming folders."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from miram.data.image import UnreadableImage, decode_png, encode_png, read_film
from miram.engine.errors import UserError

LEVELS = np.arange(65536, dtype=np.uint16).reshape(256, 256)


def png(height: int, width: int, bits: int, colour: int, raw: bytes) -> bytes:
    """A PNG by the book (ISO 15948), made without the library under test."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def lines(pixels: NDArray[np.uint16]) -> bytes:
    return b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "film.png"


@pytest.mark.parametrize("pixels", [LEVELS, (LEVELS % 256).astype(np.uint8), LEVELS[:1, :3], LEVELS[:7, :1]])
def test_pixels_survive_encoding_exactly(pixels: NDArray[np.uint16]) -> None:
    again = decode_png(encode_png(pixels), "here")
    assert again.dtype == pixels.dtype
    np.testing.assert_array_equal(again, pixels)


def test_an_encoded_png_holds_the_big_endian_samples_of_its_standard() -> None:
    content = encode_png(LEVELS)
    assert struct.unpack(">IIBB", content[16:26]) == (256, 256, 16, 0)


def test_a_16_bit_png_of_another_program_keeps_every_level(file: Path) -> None:
    file.write_bytes(png(256, 256, 16, 0, lines(LEVELS)))
    film = read_film(file, 0.07)
    np.testing.assert_array_equal(film.pixels, LEVELS)
    assert (film.max_value, film.spacing_mm) == (65535, 0.07)


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate"])
def test_a_16_bit_tiff_keeps_every_level(tmp_path: Path, compression: str | None) -> None:
    Image.fromarray(LEVELS).save(tmp_path / "film.tif", compression=compression)
    film = read_film(tmp_path / "film.tif")
    np.testing.assert_array_equal(film.pixels, LEVELS)
    assert (film.pixels.dtype, film.max_value) == (np.uint16, 65535)


def test_a_16_bit_pgm_keeps_every_level(tmp_path: Path) -> None:
    (tmp_path / "film.pgm").write_bytes(b"P5\n256 256\n65535\n" + LEVELS.astype(">u2").tobytes())
    film = read_film(tmp_path / "film.pgm")
    np.testing.assert_array_equal(film.pixels, LEVELS)
    assert (film.pixels.dtype, film.max_value) == (np.uint16, 65535)


def test_a_pgm_of_12_bits_keeps_its_levels_apart_and_their_share_of_the_largest(tmp_path: Path) -> None:
    (tmp_path / "film.pgm").write_bytes(b"P5 64 64 4095\n" + LEVELS[:16].astype(">u2").tobytes())
    film = read_film(tmp_path / "film.pgm")
    assert np.unique(film.pixels).size == 4096
    np.testing.assert_allclose(film.pixels.ravel() / film.max_value, np.arange(4096) / 4095, atol=1e-5)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp"])
def test_colour_files_with_equal_channels_are_gray(tmp_path: Path, suffix: str) -> None:
    gray = (LEVELS % 251).astype(np.uint8)
    Image.fromarray(np.repeat(gray[..., None], 3, axis=2)).save(tmp_path / f"film{suffix}")
    np.testing.assert_array_equal(read_film(tmp_path / f"film{suffix}").pixels, gray)


def test_real_colour_is_refused(file: Path) -> None:
    image = np.full((9, 9, 3), 40, np.uint8)
    image[4, 4, 2] = 41
    Image.fromarray(image).save(file)
    with pytest.raises(UnreadableImage, match="colour"):
        read_film(file)


def test_a_palette_of_real_colours_is_refused(file: Path) -> None:
    image = Image.fromarray(np.arange(9, dtype=np.uint8).reshape(3, 3), "P")
    image.putpalette([value for i in range(9) for value in (20 * i, 0, 255 - 20 * i)])
    image.save(file)
    with pytest.raises(UnreadableImage, match="colour"):
        read_film(file)


@pytest.mark.parametrize(("colour", "channels"), [(2, 3), (4, 2)], ids=["rgb", "gray and alpha"])
def test_16_bits_in_several_channels_are_kept_or_refused(file: Path, colour: int, channels: int) -> None:
    pixels = np.repeat(LEVELS[..., None], channels, axis=2)
    file.write_bytes(png(256, 256, 16, colour, lines(pixels)))
    try:
        film = read_film(file)
    except UnreadableImage:
        return
    np.testing.assert_array_equal(film.pixels, LEVELS)


def test_a_16_bit_tiff_whose_zero_is_white_is_inverted(tmp_path: Path) -> None:
    """Pillow writes and reads these 16 bits as they are, and leaves their meaning to us."""
    Image.fromarray(LEVELS).save(tmp_path / "white.tif", tiffinfo={262: 0})
    np.testing.assert_array_equal(read_film(tmp_path / "white.tif").pixels, 65535 - LEVELS)


@pytest.mark.parametrize("kept", [0.02, 0.3, 0.9])
def test_a_truncated_file_is_refused(file: Path, kept: float) -> None:
    content = encode_png(LEVELS)
    file.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(UnreadableImage):
        read_film(file)


def test_damage_anywhere_is_an_error_of_ours_or_none() -> None:
    rng = np.random.default_rng(0)
    sound = encode_png(LEVELS[:20, :20])
    complaints = []
    for _ in range(400):
        content = bytearray(sound)
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        try:
            decode_png(bytes(content), "here")
        except UserError as error:
            complaints.append(str(error))
    assert len(complaints) > 200
    assert all(text.startswith("here cannot be decoded") for text in complaints)


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n"])
def test_an_error_names_the_file_but_no_folder(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with pytest.raises(UnreadableImage) as caught:
        read_film(file)
    assert str(file.parent) not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named_without_its_folder(file: Path) -> None:
    with pytest.raises(UnreadableImage, match=file.name) as caught:
        read_film(file)
    assert str(file.parent) not in str(caught.value)


def test_a_folder_with_two_blanks_stays_out_of_errors_too(tmp_path: Path) -> None:
    folder = tmp_path / "Jane  Doe"
    folder.mkdir()
    (folder / "film.png").write_text("no image")
    with pytest.raises(UnreadableImage) as caught:
        read_film(folder / "film.png")
    assert "Doe" not in str(caught.value)


@pytest.mark.parametrize("side", [20_000, 30_000])
def test_a_decompression_bomb_is_refused(file: Path, side: int) -> None:
    file.write_bytes(png(side, side, 8, 0, b""))
    with pytest.raises(UnreadableImage, match="bomb"):
        read_film(file)


@pytest.mark.parametrize("side", [30_000])
def test_a_decompression_bomb_in_a_shard_is_an_error_of_ours(side: int) -> None:
    with pytest.raises(UserError, match="here"):
        decode_png(png(side, side, 8, 0, b""), "here")


def test_a_big_endian_tiff_keeps_every_level(tmp_path: Path) -> None:
    """As ImageJ writes them: the bytes of each value, and of the header, most significant first."""
    import struct

    height, width = LEVELS.shape
    tags = [(256, 3, width), (257, 3, height), (258, 3, 16), (259, 3, 1), (262, 3, 1), (273, 4, 122), (277, 3, 1)]
    tags += [(278, 3, height), (279, 4, 2 * height * width)]
    values = [struct.pack(">HH", value, 0) if kind == 3 else struct.pack(">I", value) for _, kind, value in tags]
    entries = b"".join(struct.pack(">HHI", *tag[:2], 1) + value for tag, value in zip(tags, values, strict=True))
    header = b"MM\0*" + struct.pack(">I", 8) + struct.pack(">H", len(tags)) + entries + struct.pack(">I", 0)
    (tmp_path / "big.tif").write_bytes(header.ljust(122, b"\0") + LEVELS.astype(">u2").tobytes())
    np.testing.assert_array_equal(read_film(tmp_path / "big.tif").pixels, LEVELS)
