"""Outlines lie on the edges of masks, and what is small is enlarged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.contour import ContourSet
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from miram.finetune.segment.overlay import SAID, TRUTH, draw_overlay, enlarged, largest, outline, present

CLASSES = ("background", "lesion")


def box(shape: tuple[int, int], top: int, left: int, height: int, width: int) -> NDArray[np.uint8]:
    mask = np.zeros(shape, np.uint8)
    mask[top : top + height, left : left + width] = 1
    return mask


def drawn(monkeypatch: pytest.MonkeyPatch, *given: Any, **more: Any) -> Figure:
    kept: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: kept.append(self))
    draw_overlay(Path("unused") / "a.png", *given, **more)
    return kept[0]


def lines_of(axis: Any) -> list[ContourSet]:
    return [one for one in axis.collections if isinstance(one, ContourSet)]


def corners(lines: ContourSet) -> NDArray[np.float64]:
    (path,) = lines.get_paths()
    return np.asarray(path.vertices)


@pytest.mark.parametrize(("top", "left"), [(3, 5), (0, 0), (22, 16)])  # inside, and at the image's edges
def test_an_outline_encloses_its_mask(top: int, left: int) -> None:
    axis = Figure().add_subplot()
    outline(axis, box((30, 20), top, left, 8, 4) > 0, (1, 0, 0), "-")
    x, y = corners(lines_of(axis)[0]).T
    assert (x.min(), x.max()) == (left - 0.5, left + 3.5)
    assert (y.min(), y.max()) == (top - 0.5, top + 7.5)
    area = abs(np.sum(x * np.roll(y, 1) - y * np.roll(x, 1))) / 2
    assert area == pytest.approx(8 * 4 - 0.5)  # each of four corners is cut by an eighth of a pixel


def test_truth_is_solid_and_the_prediction_dashed_in_another_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (60, 40)
    truth, said = box(shape, 10, 10, 30, 20), box(shape, 12, 12, 30, 20)
    bare, marked = drawn(monkeypatch, np.full(shape, 9, np.uint8), 255, truth, said, CLASSES, "key").axes
    assert not lines_of(bare)
    solid, dashed = lines_of(marked)
    assert corners(solid).min() == 9.5
    assert corners(dashed).min() == 11.5
    for lines, colour in ((solid, TRUTH), (dashed, SAID)):
        np.testing.assert_allclose(lines.get_edgecolor()[0, :3], colour)
    assert solid.get_linestyle()[0][1] is None
    assert len(dashed.get_linestyle()[0][1]) == 2


def test_several_classes_have_a_colour_each_and_what_is_not_judged_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (60, 40)
    truth = 1 * box(shape, 5, 5, 20, 20) + 2 * box(shape, 30, 5, 20, 20)
    truth[:, 36:] = 255
    figure = drawn(monkeypatch, np.ones(shape, np.uint8), 255, truth, truth % 255, ("air", "fat", "$dense$"), "key")
    (first, _, second, _, ignored) = lines_of(figure.axes[1])
    assert not np.allclose(first.get_edgecolor(), second.get_edgecolor())
    assert corners(ignored).min(0).tolist() == [35.5, -0.5]
    told = [text.get_text() for text in figure.legends[0].get_texts()]
    assert told == ["truth", "prediction", "fat", "$dense$", "not judged"]


def test_what_was_missed_is_told_and_without_a_truth_none_is_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (60, 40)
    pixels, lesion, nothing = np.ones(shape, np.uint8), box(shape, 10, 10, 30, 20), np.zeros(shape, np.uint8)

    def told(truth: Any, said: Any) -> list[str]:
        figure = drawn(monkeypatch, pixels, 255, truth, said, CLASSES, "key")
        return [text.get_text() for text in figure.legends[0].get_texts()]

    assert told(lesion, nothing) == ["truth", "prediction (nothing)"]
    assert told(nothing, lesion) == ["truth (nothing)", "prediction"]
    assert told(None, lesion) == ["prediction"]


def test_the_largest_finding_is_looked_at_and_of_none_what_was_said() -> None:
    truth, said = box((90, 90), 10, 10, 4, 4) + box((90, 90), 50, 50, 9, 9), box((90, 90), 0, 0, 20, 20)
    truth[70:] = 255
    np.testing.assert_array_equal(largest(truth, said), box((90, 90), 50, 50, 9, 9) == 1)
    np.testing.assert_array_equal(largest(0 * truth, said), said == 1)
    assert not largest(0 * truth, 0 * said).any()
    diagonal = np.eye(90, dtype=np.uint8)  # touches by corners alone
    assert largest(diagonal, said).sum() == 90
    assert present(truth).sum() == 4 * 4 + 9 * 9


@pytest.mark.parametrize("place", [(0, 0), (990, 590), (500, 300)])
def test_the_enlarged_part_lies_in_the_image_and_holds_the_finding(place: tuple[int, int]) -> None:
    focus = box((1000, 600), *place, 10, 10) > 0
    part = enlarged(focus)
    assert part is not None
    assert 0 <= part.top <= place[0]
    assert place[0] + 10 <= part.bottom <= 1000
    assert 0 <= part.left <= place[1]
    assert place[1] + 10 <= part.right <= 600
    assert part.bottom - part.top == part.right - part.left == 48


def test_what_is_large_or_not_there_is_not_enlarged() -> None:
    assert enlarged(np.zeros((100, 100), np.bool_)) is None
    assert enlarged(box((1000, 600), 100, 100, 300, 10) > 0) is None
    narrow = enlarged(box((1000, 60), 500, 20, 100, 10) > 0)  # a square wider than the image
    assert narrow is not None
    assert (narrow.left, narrow.right) == (0, 60)


def test_the_part_is_shown_at_its_place_and_framed(monkeypatch: pytest.MonkeyPatch) -> None:
    shape, rng = (900, 600), np.random.default_rng(0)
    pixels = rng.integers(0, 4096, shape).astype(np.uint16)
    truth = box(shape, 700, 200, 10, 10) + box(shape, 0, 205, 690, 1)  # which reaches beyond the part
    focus = box(shape, 700, 200, 10, 10) > 0
    axes = drawn(monkeypatch, pixels, 65535, truth, truth, CLASSES, "key", focus=focus).axes
    whole, bare, part = sorted(axes, key=lambda axis: (not axis.patches, bool(lines_of(axis))))
    assert whole.patches[0].get_bbox().bounds == (180.5, 680.5, 48, 48)
    for axis in (bare, part):
        np.testing.assert_allclose(
            axis.images[0].get_array(), np.clip(pixels[681:729, 181:229] / np.percentile(pixels, 99.8), 0, 1)
        )
        assert (axis.get_xlim(), axis.get_ylim()) == ((180.5, 228.5), (728.5, 680.5))
    edges = np.concatenate([path.vertices for path in lines_of(part)[0].get_paths()])
    assert {(199.5, 705.0), (209.5, 705.0), (205.0, 689.5)} <= set(map(tuple, edges))
    assert edges[:, 1].min() < 680  # the cut edge is not seen


def test_an_almost_black_film_is_not_brightened_into_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(0).integers(0, 4, (60, 40)).astype(np.uint16)
    figure = drawn(monkeypatch, pixels, 65535, None, np.zeros((60, 40), np.uint8), CLASSES, "key")
    assert figure.axes[0].images[0].get_array().max() < 0.02


def test_a_veil_is_the_denser_the_surer(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (60, 40)
    sure = np.zeros(shape, np.float32)
    sure[:20], sure[20:40] = 1, 0.5
    figure = drawn(
        monkeypatch, np.ones(shape, np.uint8), 255, None, box(shape, 0, 0, 30, 40), CLASSES, "key",
        probabilities=np.stack([1 - sure, sure]),
    )  # fmt: skip
    alpha = np.asarray(figure.axes[1].images[1].get_array())[..., 3]
    np.testing.assert_allclose(alpha[[0, 30, 50], 0], [0.5, 0.25, 0], atol=0.002)
    assert len(figure.axes[0].images) == 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("shape", "dtype"), [((40, 300), np.uint8), ((1100, 900, 3), np.uint16), ((1, 1), np.uint8)])
def test_any_image_has_a_picture(tmp_path: Path, shape: tuple[int, ...], dtype: Any) -> None:
    pixels = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape).astype(dtype)
    mask = np.ones(shape[:2], np.uint8)
    draw_overlay(tmp_path / "made" / "a.png", pixels, np.iinfo(dtype).max, mask, mask, CLASSES, "$\\x_$" * 30)
    with Image.open(tmp_path / "made" / "a.png") as image:
        assert min(image.size) > 400
