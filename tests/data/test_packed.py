"""Packed pixels: numpy's own bytes, read row by row, refused where the header lies."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from miram.data.image import MAX_PIXELS
from miram.data.packed import HEADER_BYTES, PackedPixels, encode_npy, parse_header

SHAPES = st.one_of(
    st.tuples(st.integers(1, 40), st.integers(1, 40)), st.tuples(st.integers(1, 40), st.integers(1, 40), st.just(3))
)
DTYPES = st.sampled_from([np.uint8, np.uint16])


class Member:
    """Bytes that count how they are read."""

    def __init__(self, content: bytes):
        self.content, self.asked = content, list[tuple[int, int]]()

    def __call__(self, offset: int, size: int) -> bytes:
        self.asked.append((offset, size))
        assert 0 <= offset <= offset + size <= len(self.content)
        return self.content[offset : offset + size]


def image(shape: tuple[int, ...], dtype: type) -> NDArray[np.uint8] | NDArray[np.uint16]:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, shape).astype(dtype)


def header(shape: tuple[int, ...], descr: str = "<u2", order: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": order, "shape": shape})
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------- reading


@given(SHAPES, DTYPES, st.data())
def test_slices_are_those_of_the_array(shape: tuple[int, ...], dtype: type, data: st.DataObject) -> None:
    pixels = image(shape, dtype)
    content = encode_npy(pixels)
    packed = PackedPixels(Member(content), len(content))
    assert (packed.shape, packed.dtype, packed.ndim, packed.nbytes) == (shape, dtype, pixels.ndim, pixels.nbytes)
    rows, columns = (slice(*sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n))))) for n in shape[:2])
    np.testing.assert_array_equal(packed[rows, columns], pixels[rows, columns])
    np.testing.assert_array_equal(packed[rows], pixels[rows])
    chosen = np.array(data.draw(st.lists(st.integers(0, shape[0] - 1), min_size=1, max_size=5)))
    np.testing.assert_array_equal(packed[chosen], pixels[chosen])
    np.testing.assert_array_equal(np.asarray(packed), pixels)
    np.testing.assert_array_equal(np.asarray(packed, dtype=np.float32), pixels.astype(np.float32))


@given(SHAPES, DTYPES)
def test_numpy_reads_what_is_written(shape: tuple[int, ...], dtype: type) -> None:
    pixels = image(shape, dtype)
    loaded = np.load(io.BytesIO(encode_npy(pixels)), allow_pickle=False)
    assert loaded.dtype == dtype
    np.testing.assert_array_equal(loaded, pixels)
    assert encode_npy(np.asfortranarray(pixels)) == encode_npy(pixels)


def test_of_a_crop_only_its_rows_are_read_and_at_once() -> None:
    pixels = image((500, 300), np.uint16)
    read = Member(encode_npy(pixels))
    packed = PackedPixels(read, len(read.content))
    read.asked.clear()
    packed[100:140, 7:19]
    assert read.asked == [(len(read.content) - pixels.nbytes + 100 * 600, 40 * 600)]


def test_slices_beyond_the_edge_end_there() -> None:
    pixels = image((20, 10), np.uint8)
    content = encode_npy(pixels)
    packed = PackedPixels(Member(content), len(content))
    np.testing.assert_array_equal(packed[15:99, 5:99], pixels[15:, 5:])
    assert packed[15:10].shape == (0, 10)


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "first",
    [
        b"",
        b"\x89PNG\r\n\x1a\n",
        header((3, 4), "<f4"),
        header((3, 4), ">u2"),
        header((3, 4), "|O"),
        header((3, 4), order=True),
        header((3,)),
        header((3, 4, 1, 1)),
        header((3, 4))[:40],
        header((3, 4)).replace(b"\x01\x00", b"\x02\x00", 1),
        header((3, 4)).replace(b"(3, 4)", b"(-3,4)"),
        header((3, 4)).replace(b"'<u2'", b"a.b()"),
    ],
)
def test_other_headers_are_refused(first: bytes) -> None:
    with pytest.raises(ValueError, match=r"no \.npy of 8- or 16-bit"):
        parse_header(first, len(first) + 24)


def test_a_member_of_another_size_than_its_pixels_is_refused() -> None:
    first = header((3, 4))
    assert parse_header(first, len(first) + 24) == ((3, 4), np.uint16, len(first))
    for size in (len(first) + 23, len(first) + 25, len(first), 0):
        with pytest.raises(ValueError, match=f"{size} bytes"):
            parse_header(first, size)
    with pytest.raises(ValueError, match="bytes"):
        parse_header(header((0, 4)), len(first))


def test_a_header_that_says_it_is_longer_or_shorter_is_refused() -> None:
    first = header((3, 4))
    for length in (0, 10, len(first), 65535):
        wrong = first[:8] + length.to_bytes(2, "little") + first[10:]
        with pytest.raises(ValueError, match="bytes"):
            parse_header(wrong + bytes(24), len(wrong) + 24)


def test_a_pixel_bomb_is_refused_before_a_row_is_read() -> None:
    first = header((MAX_PIXELS + 1, 1), "|u1")
    with pytest.raises(ValueError, match="more than"):
        parse_header(first, len(first) + MAX_PIXELS + 1)


@given(st.binary(max_size=8), st.integers(0, 127), st.integers(0, 10**6))
def test_a_mutated_header_is_read_as_numpy_reads_it_or_refused(junk: bytes, at: int, size: int) -> None:
    content = encode_npy(image((6, 5), np.uint16))
    mutated = content[:at] + junk + content[at + len(junk) :]
    try:
        shape, dtype, offset = parse_header(mutated[:HEADER_BYTES], size if size % 2 else len(mutated))
    except ValueError:
        return
    loaded = np.load(io.BytesIO(mutated), allow_pickle=False)
    assert (loaded.shape, loaded.dtype) == (shape, dtype)
    assert loaded.tobytes() == mutated[offset:]
