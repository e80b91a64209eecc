"""Pictures: drawn for what they make sense for, and true to the figures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from made_up_judged import binary_logits, folds_of, judge, labelled, population, section
from matplotlib.figure import Figure
from PIL import Image

from miram.engine.metrics import Estimate, Kind, ranking
from miram.finetune.classify.figures import GRID, Claims, draw_figures, lines, shares_of
from miram.finetune.classify.sweep_figure import draw_sweep

DRAWN = {
    "binary": {"roc.png", "pr.png", "calibration.png", "confusion.png"},
    "multilabel": {"roc.png", "pr.png", "calibration.png"},
    "multiclass": {"calibration.png", "confusion.png"},
    "ordinal": {"calibration.png", "confusion.png"},
}


@pytest.mark.parametrize("kind", list(DRAWN))
def test_each_kind_has_its_pictures_with_a_caption_each(tmp_path: Path, kind: Kind) -> None:
    of, logits = population(kind, 20, 0)
    captions = draw_figures(tmp_path / "figures", judge(of, logits, folds_of(of, 2)), section())
    assert set(captions) == DRAWN[kind] == {path.name for path in (tmp_path / "figures").iterdir()}
    assert all(caption.endswith(".") for caption in captions.values())
    for name in captions:
        with Image.open(tmp_path / "figures" / name) as image:
            assert min(image.size) > 300
            assert len(image.convert("RGB").getcolors(1 << 20) or []) > 20


@pytest.mark.parametrize("small", [0, 10])
def test_the_area_under_the_drawn_curve_is_the_auc_within_folds(small: int) -> None:
    of, logits = population("binary", 40, 0)
    fold = (np.arange(160) < 4 * small).astype(int)
    logits[fold == 1] *= -1  # the model of the small fold is always wrong
    for line in lines(judge(of, logits, fold), section()):
        area = np.trapezoid(line.sensitivity(line.once)[0], GRID)
        auc = ranking.auc(line.truth, line.score, line.once, line.folds)[0]
        assert area == pytest.approx(auc, abs=0.005)


def test_the_band_holds_the_curve_and_is_narrower_with_more_patients() -> None:
    rng, widths = np.random.default_rng(0), []
    truth = np.arange(40) % 2
    scores = np.clip(0.4 + 0.2 * truth + 0.2 * rng.normal(size=40), 0.01, 0.99)
    for times in (1, 9):  # the same curve, of as many times the patients
        of = labelled("binary", np.tile(truth, times), [f"p{i}" for i in range(40 * times)])
        line = lines(judge(of, binary_logits(np.tile(scores, times))), section())[0]
        (low, high), curve = line.band(0), line.sensitivity(line.once)[0]
        assert ((low <= curve) & (curve <= high)).mean() > 0.95
        widths.append((high - low).mean())
    assert widths[1] < widths[0] / 2


def test_levels_of_one_class_and_labels_nobody_has_are_not_drawn(tmp_path: Path) -> None:
    of = labelled("binary", [0, 1] * 6, [f"p{i // 2}" for i in range(12)], ["L", "R"] * 6)
    judged = judge(of, binary_logits(np.linspace(0.1, 0.9, 12)))
    assert [line.name for line in lines(judged, section())] == ["images", "breasts"]
    draw_figures(tmp_path, judged, section(headline="patient"))
    of, logits = population("multilabel", 12, 0)
    of.truth[:, 1] = 0
    assert {line.name for line in lines(judge(of, logits), section())} == {"mass", "nodes"}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("kind", "truth", "fold"),
    [
        ("binary", [1] * 6, 0),
        ("binary", [0], 0),
        ("binary", [0, 0, 1, 1], np.array([0, 0, 1, 1])),  # nothing to compare within a fold
        ("multilabel", [[1, 0, 0]] * 4, 0),
    ],
)
def test_without_both_classes_there_is_no_curve(tmp_path: Path, kind: Kind, truth: list[Any], fold: Any) -> None:
    n = len(truth)
    of = labelled(kind, truth, [f"p{i}" for i in range(n)])
    logits = binary_logits(np.linspace(0.1, 0.9, n)) if kind == "binary" else np.zeros((n, 3))
    drawn = draw_figures(tmp_path, judge(of, logits, fold), section())
    assert set(drawn) == DRAWN[kind] - {"roc.png", "pr.png"} == {path.name for path in tmp_path.iterdir()}


@pytest.mark.filterwarnings("error")
def test_one_patient_has_curves_and_no_band(tmp_path: Path) -> None:
    of = labelled("binary", [0, 1, 1], ["a", "a", "a"])
    captions = draw_figures(tmp_path, judge(of, binary_logits([0.2, 0.6, 0.8])), section())
    assert "band" not in captions["roc.png"]
    two = labelled("binary", [0, 1, 1], ["a", "b", "b"])
    assert "band" in draw_figures(tmp_path, judge(two, binary_logits([0.2, 0.6, 0.8])), section())["roc.png"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", list(DRAWN))
def test_dollars_in_names_are_no_formulas(tmp_path: Path, kind: Kind) -> None:
    of, logits = population(kind, 8, 0)
    target = replace(of.target, name="$\\x_$", classes=tuple(f"${i}$\\frac{{" for i in range(len(of.target.classes))))
    assert draw_figures(tmp_path, judge(replace(of, target=target), logits), section())


def test_a_sweep_of_methods_with_dollars_is_drawn(tmp_path: Path) -> None:
    standing = SimpleNamespace(value=Estimate(0.7, (0.6, 0.8)), by_seed={0: 0.7})
    for fractions in ((1.0,), (0.1, 1.0)):
        found: Any = {fraction: {"$\\x_$": standing} for fraction in fractions}
        draw_sweep(tmp_path / f"{len(fractions)}.png", found, "$\\x_$")
        assert (tmp_path / f"{len(fractions)}.png").stat().st_size > 1000


def test_calibration_asks_what_the_ece_asks() -> None:
    of = labelled("multiclass", [0, 2], ["a", "b"])
    shares = np.array([[0.7, 0.2, 0.1], [0.5, 0.3, 0.2]])
    found = Claims.of(judge(of, np.log(shares)), shares)
    assert (found.said.tolist(), found.so.tolist(), found.owner.tolist()) == ([0.7, 0.5], [1, 0], [0, 1])
    assert (found.held.tolist(), found.mean.tolist(), found.share.tolist()) == ([7, 10], [0.5, 0.7], [0, 1])
    shares = shares_of(np.array([1, 0, 1]), np.array([3, 3, 5]), np.array([3, 5]), np.array([[1.0, 1, 1], [3, 1, 0]]))
    np.testing.assert_array_equal(shares, [[0.5, 1.0], [0.75, np.nan]])


def test_the_confusion_picture_shows_the_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(
        Figure, "savefig", lambda self, path, **_: told.extend(t.get_text() for t in self.axes[0].texts)
    )
    of = labelled("binary", [0, 0, 0, 1, 1], ["a", "b", "c", "d", "e"])
    draw_figures(tmp_path, judge(of, binary_logits([0.1, 0.2, 0.7, 0.9, 0.8])), section())
    assert [text for text in told if "%" in text] == ["2\n67%", "1\n33%", "0\n0%", "2\n100%"]
