"""Pictures of segmented images: drawn for what there is, and true to the figures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from numpy.typing import NDArray
from pictured import case, lesion, lesions, sample, square, tissues
from PIL import Image

from miram.finetune.segment.cases import Candidate, Case, Overlap
from miram.finetune.segment.figures import GRID, band, draw_dice, draw_figures, draw_froc, draw_sizes, froc
from miram.finetune.segment.judging import draws_of
from miram.finetune.segment.measures import RATES

CLASSES = ("background", "lesion")


def many(count: int = 40, patients: int = 20) -> list[Case]:
    """Images of which half have a lesion, some found, with false marks of all scores."""
    rng, found = np.random.default_rng(0), list[Case]()
    for number in range(count):
        dice = None if number % 2 else float(np.round(rng.uniform(0, 1) * (rng.uniform() > 0.3), 2))
        one = case(f"k{number}", dice, patient=f"p{number % patients}")
        seen = tuple(replace(x, score_iou=s, score_point=s) for x in one.lesions if (s := rng.uniform()))
        false = tuple(Candidate(1, float(rng.uniform()), 9, 0, 0) for _ in range(rng.poisson(2)))
        found.append(replace(one, lesions=seen, candidates=false, spacing_mm=0.5))
    return found


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: figures.append(self))
    return figures


@pytest.mark.filterwarnings("error")
def test_what_there_is_is_drawn_with_a_caption_each(tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    said: dict[str, tuple[NDArray[np.uint8] | None, NDArray[np.uint8], Case]] = {
        "found": (square(10, 10, 10), square(10, 10, 9), case("found", 0.9)),
        "missed": (square(40, 40, 10), square(0, 0, 0), case("missed", 0.0)),
        "alarm": (None, square(60, 50, 5), case("alarm", false=25)),
        "quiet": (None, square(0, 0, 0), case("quiet")),
    }
    for key, (_, mask, _) in said.items():
        Image.fromarray(mask).save(masks / f"{key}.png")
    shards = [sample(key, mask) for key, (mask, _, _) in said.items()]
    rows = {key: row for row, key in enumerate(said)}
    cases = [one for _, _, one in said.values()]
    captions = draw_figures(tmp_path / "figures", cases, shards, rows, masks, lesions(), 0)  # type: ignore[arg-type]
    overlays = {"overlay-1-best-1.png", "overlay-4-missed-1.png", "overlay-5-false-alarm-1.png"}
    assert set(captions) == {"dice.png", "froc.png", "lesions-by-size.png"} | overlays
    assert set(captions) == {path.name for path in (tmp_path / "figures").iterdir()}
    assert all(caption.endswith(".") for caption in captions.values())
    for name in captions:
        with Image.open(tmp_path / "figures" / name) as image:
            assert min(image.size) > 250


@pytest.mark.filterwarnings("error")
def test_classes_have_no_froc_and_images_with_nothing_no_dice(tmp_path: Path) -> None:
    Image.fromarray(square(6, 6, 30)).save(tmp_path / "k.png")
    tissue = case("k", overlaps=(Overlap(900, 900, 841), Overlap(0, 0, 0)), lesions=(), candidates=())
    shards = [sample("k", square(5, 5, 30))]
    captions = draw_figures(tmp_path, [tissue], shards, {"k": 0}, tmp_path, tissues())  # type: ignore[arg-type]
    assert set(captions) == {"dice.png", "overlay-1-best-1.png"}
    nothing = draw_figures(tmp_path, [case("k")], shards, {"k": 0}, tmp_path, lesions())  # type: ignore[arg-type]
    assert nothing == {}


def test_the_froc_curve_passes_through_what_counting_gives(kept: list[Figure], tmp_path: Path) -> None:
    cases = many()
    caption = draw_froc(tmp_path / "a.png", cases, draws_of(cases, 50, 0))
    curve, dots = kept[0].axes[0].lines[:2]
    x, y = np.asarray(curve.get_xdata()), np.asarray(curve.get_ydata())
    assert np.all(np.diff(y) >= 0)
    scores = [of.score_iou for one in cases for of in one.lesions]
    false = np.array([mark.score for one in cases for mark in one.candidates])
    for rate in RATES:
        best = max(
            np.mean([score >= least for score in scores])
            for least in [2.0, *scores]
            if np.sum(false >= least) <= rate * len(cases)
        )
        assert y[np.isclose(x, rate)] == pytest.approx(best)
        assert np.asarray(dots.get_ydata())[RATES.index(rate)] == pytest.approx(best)
    told = kept[0].axes[0].get_legend().get_texts()[0].get_text()
    assert told == f"IoU rule, mean of the dots {np.mean(np.asarray(dots.get_ydata())):.3f}"
    assert "share of 20 lesions" in caption
    assert "all 40 images" in caption


def test_the_band_holds_the_curve_and_is_narrower_with_more_patients() -> None:
    cases, widths = many(), []
    for times in (1, 6):  # the same curve, of as many times the patients
        of = [replace(one, patient=f"{one.patient}-{time}") for time in range(times) for one in cases]
        low, high = band(of, "iou", draws_of(of, 200, 0))
        curve = froc(of, "iou")
        assert ((low <= curve) & (curve <= high)).mean() > 0.95
        widths.append((high - low).mean())
    assert widths[1] < widths[0] / 2
    assert set(np.round(RATES, 9)) <= set(np.round(GRID, 9))


@pytest.mark.filterwarnings("error")
def test_one_patient_has_no_bands_and_no_intervals(tmp_path: Path, kept: list[Figure]) -> None:
    cases = [replace(one, patient="p") for one in many()]
    draws = draws_of(cases, 50, 0)
    assert "bands" not in draw_froc(tmp_path / "a.png", cases, draws)
    assert not kept[0].axes[0].collections
    assert "lines" not in draw_sizes(tmp_path / "b.png", cases, draws)


def test_sizes_show_the_shares_of_their_lesions(tmp_path: Path, kept: list[Figure]) -> None:
    sizes = [(20, 0.5), (150, 0.0), (151, 0.8), (5000, 0.7)]  # pixels of 0.5 mm: 2.5, 6.9, 6.9 and 39.9 mm across
    cases = [replace(case(str(area), dice, spacing_mm=0.5), lesions=(lesion(area, dice),)) for area, dice in sizes]
    caption = draw_sizes(tmp_path / "a.png", cases, draws_of(cases, 50, 0))
    axis = kept[0].axes[0]
    names = [text.get_text() for text in axis.get_yticklabels()]
    assert names == ["< 5 mm\n1 lesion", "5 to 10 mm\n2 lesions", ">= 20 mm\n1 lesion"]
    iou, point, dice = (np.asarray(line.get_xdata()) for line in axis.lines)
    assert iou.tolist() == point.tolist() == [1, 0.5, 1]
    assert dice == pytest.approx([0.5, 0.4, 0.7])
    assert "in mm" in caption
    unknown = [replace(one, spacing_mm=None) for one in cases]
    assert "pixels of the stored image" in draw_sizes(tmp_path / "a.png", unknown, draws_of(unknown, 50, 0))


def test_the_picture_of_dice_counts_every_image_and_tells_apart_those_with_none(
    tmp_path: Path, kept: list[Figure]
) -> None:
    dices = [0.0, 0.0, 0.0, 0.01, 0.51, 0.52, 1.0]
    cases = [*(case(str(i), dice) for i, dice in enumerate(dices)), case("negative", false=9)]
    draw_dice(tmp_path / "a.png", cases, CLASSES)
    (axis,) = kept[0].axes
    nothing, something = ([bar.get_height() for bar in bars] for bars in axis.containers)
    assert nothing == [3, *[0] * 19]
    assert something == [1, *[0] * 9, 2, *[0] * 8, 1]
    assert axis.get_title(loc="left") == "lesion: 7 images, mean 0.291, median 0.010"


def test_of_many_classes_those_on_most_images_are_shown_and_dollars_are_no_formulas(
    tmp_path: Path, kept: list[Figure]
) -> None:
    there = [tuple(Overlap(9 * (number <= most), 9, 0) for number in range(8)) for most in range(8)]
    cases = [case(str(i), overlaps=of, lesions=()) for i, of in enumerate(there)]
    names = ("air", *(f"$\\x_{number}$" for number in range(8)))
    caption = draw_dice(tmp_path / "a.png", cases, names)
    titles = [axis.get_title(loc="left").split(":")[0] for axis in kept[0].axes]
    assert titles == [*names[1:7]]
    assert "Of 8 classes the 6 on most images" in caption
