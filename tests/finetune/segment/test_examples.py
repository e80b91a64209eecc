"""Shown are the images that the captions say, and on them what they say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pictured import case, lesion, lesions, sample, square, tissues
from PIL import Image

from miram.finetune.segment.cases import Case, Overlap
from miram.finetune.segment.examples import draw_examples, examples, largest_false
from miram.finetune.segment.measures import dice_of

CLASSES = ("background", "lesion")


def chosen(cases: list[Case], classes: tuple[str, ...] = CLASSES) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for example in examples(cases, classes):
        found.setdefault(example.kind, []).append(example.case.key)
    return found


def test_the_best_the_median_and_the_worst_are_those_by_dice() -> None:
    cases = [case(f"{number}", number / 10) for number in range(1, 10)]  # Dice 0.1 … 0.9, median 0.5
    assert chosen(cases[::2] + cases[1::2]) == {"best": ["9", "8"], "worst": ["1", "2"], "median": ["5", "4"]}


def test_the_median_counts_what_was_missed_and_the_worst_is_of_what_was_found() -> None:
    cases = [case("a", 0.2), case("b", 0.3), case("c", 0.9), *(case(f"m{i}", 0.0) for i in range(3))]
    found = {example.kind: example for example in examples(cases, CLASSES)}
    assert found["worst"].case.key == "a"
    assert found["median"].case.key == "b"  # 0.1 is the median of all six; what is nearer is shown already
    assert "nearest to the median 0.100 of 6 images" in found["median"].why
    cases += [case(f"n{i}", 0.0) for i in range(3)]
    assert chosen(cases)["median"] == ["m2", "n0"]  # the median is a miss


def test_the_largest_lesions_that_no_rule_calls_hit_are_missed() -> None:
    small, large = lesion(40, 0.0), lesion(400, 0.0)
    touched = lesion(900, 0.05, hit=False)
    point = replace(lesion(5000, 0.05, hit=False), hit_point=True)
    cases = [replace(case(key, 0.0), lesions=of) for key, of in (("s", (small,)), ("l", (large,)), ("t", (touched,)))]
    assert chosen(cases)["missed"] == ["t", "l"]
    assert "missed" not in chosen([replace(case("p", 0.05), lesions=(point,))])
    (why,) = [x.why for x in examples([replace(case("mm", 0.0), lesions=(large,), spacing_mm=0.1)], CLASSES)]
    assert why.startswith("a lesion of 2.3 mm across")  # 2 sqrt(400 / pi) pixels of 0.1 mm


def test_false_alarms_are_on_images_without_findings_as_long_as_there_are_some() -> None:
    cases = [case("found", 0.5, false=900), case("a", false=30), case("b", false=50), case("quiet")]
    assert chosen(cases)["false alarm"] == ["b", "a"]
    assert chosen(cases[:2])["false alarm"] == ["a", "found"]
    assert "false alarm" not in chosen([case("quiet")])


def test_an_image_is_shown_once_and_nothing_of_nothing() -> None:
    cases = [case("one", 0.5, false=50), case("two", 0.0)]
    shown = [example.case.key for example in examples(cases, CLASSES)]
    assert sorted(shown) == ["one", "two"]
    assert examples([], CLASSES) == examples([case("quiet")], CLASSES) == []


def test_several_classes_have_the_mean_dice_of_those_that_are_there() -> None:
    one = case("k", overlaps=(Overlap(100, 100, 50), Overlap(0, 70, 0), Overlap(10, 10, 10)))
    assert dice_of(one) == pytest.approx(0.75)
    assert np.isnan(dice_of(case("nothing")))


def test_a_class_that_was_missed_altogether_is_shown_where_no_lesions_are_told_apart() -> None:
    half = case("k", overlaps=(Overlap(100, 100, 50), Overlap(30, 40, 0)), lesions=())
    (found,) = examples([half], ("background", "fat", "dense"))
    assert (found.kind, found.cls, found.why) == ("missed", 2, "nothing of its 30 pixels of dense was found")


def test_the_largest_false_part_touches_nothing_of_its_class_and_is_known() -> None:
    truth = square(10, 10, 10) + square(60, 10, 20, 255)
    said = square(15, 15, 30) + square(60, 10, 20) + square(60, 50, 5) + square(70, 60, 6, 2)
    np.testing.assert_array_equal(largest_false(truth, said), square(70, 60, 6) == 1)
    other = largest_false(square(60, 50, 5, 2), square(60, 50, 5))  # of another class
    np.testing.assert_array_equal(other, square(60, 50, 5) == 1)
    assert not largest_false(truth, square(15, 15, 30)).any()


def test_examples_are_drawn_from_the_masks_that_were_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    monkeypatch.setattr(
        "miram.finetune.segment.examples.draw_overlay",
        lambda path, *given, focus: seen.update({path.name: (*given, focus)}),
    )
    said = {"found": square(10, 10, 9), "missed": square(60, 50, 0), "alarm": square(60, 50, 5)}
    masks = {"found": square(10, 10, 10), "missed": square(30, 30, 10, 2) + square(50, 10, 4), "alarm": None}
    for key, mask in said.items():
        Image.fromarray(mask).save(tmp_path / f"{key}.png")
    small, large = lesion(16, 0.0, number=1), lesion(100, 0.0, number=2)
    cases = [case("found", 0.9), replace(case("missed", 0.0), lesions=(small, large)), case("alarm", false=25)]
    shards = [sample(key, mask) for key, mask in masks.items()]
    rows = {key: row for row, key in enumerate(masks)}
    captions = draw_examples(tmp_path, cases, shards, rows, tmp_path, lesions())  # type: ignore[arg-type]
    assert [*captions] == [*seen] == ["overlay-1-best-1.png", "overlay-4-missed-1.png", "overlay-5-false-alarm-1.png"]
    for name, key, focus in zip(seen, said, (None, square(30, 30, 10), said["alarm"]), strict=True):
        pixels, max_value, truth, drawn, classes, title, looked = seen[name]
        assert (max_value, classes, title.split(": ")[1]) == (255, CLASSES, key)
        np.testing.assert_array_equal(pixels, shards[rows[key]].pixels)
        np.testing.assert_array_equal(truth, 0 * drawn if masks[key] is None else masks[key] > 0)
        np.testing.assert_array_equal(drawn, said[key])
        assert (looked is None) if focus is None else (looked == (focus > 0)).all()
    assert captions["overlay-4-missed-1.png"].startswith("Missed: missed, a lesion of 11 pixels across")


def test_classes_are_drawn_too(tmp_path: Path) -> None:
    mask = square(5, 5, 30) + square(50, 5, 20, 2) + square(80, 60, 10, 9)
    said = square(6, 6, 30)
    Image.fromarray(said).save(tmp_path / "k.png")
    half = case("k", overlaps=(Overlap(900, 900, 841), Overlap(400, 0, 0)), lesions=())
    captions = draw_examples(tmp_path, [half], [sample("k", mask)], {"k": 0}, tmp_path, tissues())  # type: ignore[arg-type]
    assert [*captions] == ["overlay-4-missed-1.png"]
    with Image.open(tmp_path / "overlay-4-missed-1.png") as image:
        assert min(image.size) > 400
