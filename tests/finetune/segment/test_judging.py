"""What result.json says of segmented images: figures that hold what they say, for any set of images."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pictured import case, lesion

from miram.engine.result import parse_result
from miram.finetune.segment.cases import Case, Overlap, Rules
from miram.finetune.segment.judging import draws_of, figures_of

CLASSES = ("background", "lesion")
TISSUES = ("background", "fat", "dense")


def judged(cases: list[Case], classes: tuple[str, ...] = CLASSES, replicates: int = 50) -> dict[str, Any]:
    return figures_of(cases, classes, Rules(), replicates, 0)


def some(spacing: float | None = 0.5) -> list[Case]:
    dices = [0.9, 0.7, 0.0, None, 0.8, 0.3, None, None, 0.6, 0.0, 0.5, None]
    return [
        case(f"k{i}", dice, 5 * (i % 3) * (dice is None), patient=f"p{i // 2}", spacing_mm=spacing)
        for i, dice in enumerate(dices)
    ]


def tissue(key: str, *overlaps: tuple[int, int, int], patient: str = "") -> Case:
    return case(key, overlaps=tuple(Overlap(*of) for of in overlaps), lesions=(), candidates=(), patient=patient)


def row_of(result: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [row for row in result["rows"] if row["name"] == name]
    return found


def table_of(result: dict[str, Any], title: str) -> dict[str, Any]:
    (found,) = [table for table in result["tables"] if table["title"] == title]
    return found


def values_of(result: dict[str, Any]) -> dict[str, float | None]:
    """Every figure of one value by title and name."""
    return {
        f"{table['title']}: {row[0]}: {column}": cell["value"]
        for table in result["tables"]
        for row in table["rows"]
        for column, cell in enumerate(row)
        if isinstance(cell, dict)
    }


def test_the_mean_dice_leads_with_the_interval_of_repeated_patients() -> None:
    cases = some()
    result, draws = judged(cases, replicates=200), draws_of(cases, 200, 0)
    dices = [0.9, 0.7, 0.0, 0.8, 0.3, 0.6, 0.0, 0.5]
    assert result["metric"] == "mean Dice"
    assert result["value"] == pytest.approx(np.mean(dices))
    sampled = []
    for times in draws.times.tolist():
        repeated = [
            of for of in cases for _ in range(times[draws.patients.tolist().index(of.patient)]) if of.overlaps[0].truth
        ]
        sampled.append(np.mean([2 * of.overlaps[0].both / (of.overlaps[0].truth + of.overlaps[0].said)
                                for of in repeated]))  # fmt: skip
    assert result["interval"] == pytest.approx(np.percentile(sampled, [2.5, 97.5]).tolist())
    assert result["rows"][0] == {"name": "mean Dice", "value": result["value"], "interval": result["interval"],
                                 "detail": "8 images with something on them"}  # fmt: skip
    assert (result["n_images"], result["n_patients"], result["task"]) == (12, 6, "lesion")
    assert result["classes"] == {"nothing on them": 4, "lesion": 8}


ODD: dict[str, tuple[list[Case], tuple[str, ...]]] = {
    "usual": (some(), CLASSES),
    "no spacing": (some(None), CLASSES),
    "nothing anywhere": ([case("a"), case("b", false=9)], CLASSES),
    "all missed": ([case("a", 0.0), case("b", 0.0)], CLASSES),
    "one image": ([case("a", 0.5)], CLASSES),
    "one patient": ([case("a", 0.5, patient="p"), case("b", patient="p")], CLASSES),
    "a class that is nowhere": ([tissue("a", (9, 9, 9), (0, 5, 0)), tissue("b", (9, 9, 3), (0, 0, 0))], TISSUES),
    "many classes": ([tissue("a", *[(9, 9, 9)] * 6)], ("air", *"abcdef")),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", list(ODD))
def test_any_set_of_images_gives_a_result_that_the_report_reads_whole(name: str) -> None:
    result, damage = judged(*ODD[name]), list[str]()
    read = parse_result(json.dumps({"schema": "miram.result/1", **result}, allow_nan=False), damage)
    assert not damage
    assert len(read.tables) == len(result["tables"])
    assert all(note.endswith(".") for note in [*result["notes"], *(table["note"] for table in result["tables"])])
    assert all(table["rows"] for table in result["tables"])


def test_one_more_missed_lesion_makes_every_mean_it_belongs_to_worse() -> None:
    before, after = (values_of(judged(cases)) for cases in (some(), [*some(), case("new", 0.0, spacing_mm=0.5)]))
    better = [name for name in before if before[name] and after[name] > before[name]]
    assert not better
    worse = {name.split(": ")[-2] for name in before if after[name] < before[name]}
    assert worse >= {
        "mean Dice", "mean IoU", "pooled Dice", "lesion sensitivity, IoU rule", "lesion sensitivity, point rule",
        "lesion Dice, missed as 0", "8", "mean (CPM)", "5 to 10 mm",
    }  # fmt: skip
    unmoved = {"lesion Dice, not missed", "HD95 of not missed, mm", "surface Dice of not missed"}
    assert not worse & unmoved
    missed = [judged(cases)["tables"][2]["columns"][1] for cases in (some(), [*some(), case("new", 0.0)])]
    assert missed == ["8 lesions, 2 missed", "9 lesions, 3 missed"]


def test_figures_are_put_where_they_are_looked_for() -> None:
    result = judged(some())
    (share, *_), columns = table_of(result, "Images with nothing on them")["rows"], table_of(result, "Lesions")
    assert share[1]["value"] == row_of(result, "negatives with anything said")["value"] == 0.5
    assert columns["columns"] == ["figure", "8 lesions, 2 missed"]
    by_name = {row[0]: row[1]["value"] for row in columns["rows"]}
    assert by_name["lesion Dice, missed as 0"] == pytest.approx(3.8 / 8)
    assert by_name["lesion Dice, not missed"] == pytest.approx(3.8 / 6)
    assert by_name["HD95 of not missed, mm"] == pytest.approx(1.5)  # 3 pixels of 0.5 mm
    middle = {row[0]: row[3:] for row in table_of(result, "Images with something on them")["rows"]}
    dices = [0.9, 0.7, 0.0, 0.8, 0.3, 0.6, 0.0, 0.5]
    assert middle["mean Dice"] == pytest.approx([np.median(dices), np.std(dices, ddof=1)])
    assert middle["pooled Dice"] == [None, None]
    rates = [row[0] for row in table_of(result, "FROC: lesions found at false marks per image")["rows"]]
    assert rates == ["0.125", "0.25", "0.5", "1", "2", "4", "8", "mean (CPM)"]


def test_lesions_are_in_the_stratum_of_their_size_missed_or_not() -> None:
    sizes = {20: 0.5, 150: 0.0, 151: 0.8, 5000: 0.7}  # pixels of 0.5 mm: 2.5, 6.9, 6.9 and 39.9 mm across
    cases = [
        replace(case(str(area), dice, spacing_mm=0.5), lesions=(lesion(area, dice),)) for area, dice in sizes.items()
    ]
    rows = {row[0]: row[1:] for row in table_of(judged(cases), "Lesions by size")["rows"]}
    assert {name: tuple(row[:2]) for name, row in rows.items()} == {
        "< 5 mm": (1, 0), "5 to 10 mm": (2, 1), "10 to 20 mm": (0, 0), ">= 20 mm": (1, 0)
    }  # fmt: skip
    assert [figure["value"] for figure in rows["5 to 10 mm"][2:]] == pytest.approx([0.5, 0.5, 0.4])
    assert rows["10 to 20 mm"][2:] == [None, None, None]


def test_several_classes_have_figures_each_of_its_own() -> None:
    cases = [
        tissue("a", (100, 100, 50), (10, 10, 10)),
        tissue("b", (0, 20, 0), (10, 30, 5)),
        tissue("c", (9, 9, 0), (0, 0, 0)),
    ]
    result = judged(cases, TISSUES)
    assert result["task"] == "fat, dense"
    assert result["value"] == pytest.approx(np.mean([(0.5 + 1) / 2, 0.25, 0]))
    assert row_of(result, "mean Dice, fat")["value"] == pytest.approx((0.5 + 0) / 2)
    assert row_of(result, "mean Dice, dense")["value"] == pytest.approx((1 + 0.25) / 2)
    assert result["classes"] == {"nothing on them": 0, "fat": 2, "dense": 2}
    assert [table["title"] for table in result["tables"]] == [
        "Images with something on them",
        "Images with nothing on them",
    ]
    columns = table_of(result, "Images with nothing on them")["columns"]
    assert columns == ["figure", "fat: 1 image", "dense: 1 image"]
    assert not any("lesion" in note for note in result["notes"])


def test_lesions_of_several_classes_have_columns_and_sizes_each() -> None:
    cases = [
        case("a", overlaps=(Overlap(100, 90, 80), Overlap(9, 0, 0)), lesions=(lesion(100, 0.8), lesion(9, 0.0, cls=2)))
    ]
    result = judged(cases, ("background", "mass", "calcification"))
    heads = table_of(result, "Lesions")["columns"]
    assert heads == ["figure", "2 lesions, 1 missed", "mass: 1 lesion, 0 missed", "calcification: 1 lesion, 1 missed"]
    titles = [table["title"] for table in result["tables"]]
    assert {"Lesions by size", "Lesions by size: mass", "Lesions by size: calcification"} <= set(titles)


def test_notes_say_the_rules_the_unit_and_what_intervals_are_of() -> None:
    def told(cases: list[Case], rules: Rules | None = None) -> str:
        return " ".join(figures_of(cases, CLASSES, rules or Rules(), 20, 0)["notes"])

    known, unknown = told(some(), Rules(iou=0.25, floor=0.07)), told(some(None))
    assert "intersection over union with it of at least 0.25" in known
    assert "probability 0.07 or more" in known
    assert "within 1 mm of the other" in known
    assert "pixels of the stored images" not in known
    assert "within 5 pixels of the other" in unknown
    assert "spacing of 12 of 12 images is unknown" in unknown
    assert "within 1 mm, or where the spacing is unknown 5 pixels of" in told([*some(), *some(None)[:1]])
    assert "20 bootstrap samples of patients" in known
    assert "With 6 patients they are too short" in known
    assert "no intervals" in told([case("a", 0.5, patient="p"), case("b", patient="p")])
    folds = [replace(of, fold=number % 2) for number, of in enumerate(some())]
    assert "all folds together" in told(folds)
    assert "all folds together" not in known


def test_a_single_patient_has_figures_and_no_intervals() -> None:
    result = judged([case("a", 0.5, patient="p"), case("b", patient="p")])
    assert (result["value"], result["interval"]) == (0.5, None)
    assert all(row["interval"] is None for row in result["rows"])
