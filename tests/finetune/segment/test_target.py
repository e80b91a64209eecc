"""From stored masks to what is segmented."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from miram.data.findings import IGNORED
from miram.data.masks import Held
from miram.data.shards import Sample, ShardDataset
from miram.engine.errors import UserError
from miram.finetune.segment.config import SegmentSection
from miram.finetune.segment.survey import survey
from miram.finetune.segment.target import read_target


@pytest.fixture(scope="module")
def shards(phantoms: Path) -> ShardDataset:
    return ShardDataset(phantoms)


def masks(shards: ShardDataset, first: Sequence[Held], rest: Held) -> list[Held]:
    return [*first, *[rest] * (len(shards) - len(first))]


def sample(mask: Any) -> Sample:
    mask = None if mask is None else np.array(mask, np.uint8)
    shape = (4, 6) if mask is None else mask.shape
    return Sample("k", np.zeros(shape, np.uint8), 255, {}, mask)


FOUND = Held("instances", True, {0: 990, 1: 10})
CLEAN = Held("instances", True, {0: 100})
BARE = Held(None, True, {})
TISSUE = Held("classes", True, {0: 5, 3: 5})


def test_a_lesion_is_a_numbered_finding_or_a_part_where_nothing_is_numbered(shards: ShardDataset) -> None:
    numbered = Held("instances", True, {0: 90, 1: 5, 2: 5})
    for first, lesion, parts in (
        (FOUND, "auto", True),
        (numbered, "auto", False),
        (numbered, "part", True),
        (FOUND, "finding", False),
    ):
        asked = read_target(shards, masks(shards, [first], CLEAN), SegmentSection(lesion=lesion))  # type: ignore[arg-type]
        assert asked.target.parts == parts
        assert ("part" if parts else "numbered") in asked.notes[-1]


def test_findings_are_numbered_through(shards: ShardDataset) -> None:
    one = sample([[1, 1, 0, 0, 2, 0], [0, 0, 1, 0, 2, 0], [0, 0, 0, 0, 0, 0], [1, 0, 0, 7, 0, 0]])
    found = masks(shards, [FOUND], CLEAN)
    target = read_target(shards, found, SegmentSection(lesion="part")).target
    assert target.classes == ("background", "lesion")
    assert np.array_equal(target.truth(one), one.mask > 0)
    # Pixels that share a corner are one lesion; the same number elsewhere is another.
    expected = [[1, 1, 0, 0, 3, 0], [0, 0, 1, 0, 3, 0], [0, 0, 0, 0, 0, 0], [2, 0, 0, 4, 0, 0]]
    assert np.array_equal(target.findings(one), expected)
    whole = read_target(shards, found, SegmentSection(lesion="finding")).target
    assert np.array_equal(whole.findings(one), np.array([0, 1, 2, 0, 0, 0, 0, 3])[one.mask])


def test_an_image_without_a_mask_has_nothing_on_it(shards: ShardDataset) -> None:
    target = read_target(shards, masks(shards, [FOUND], CLEAN), SegmentSection()).target
    assert not target.truth(sample(None)).any()
    assert not target.findings(sample(None)).any()


def test_images_without_a_mask_are_negatives_of_findings_and_left_out_of_classes(shards: ShardDataset) -> None:
    asked = read_target(shards, masks(shards, [FOUND, BARE], CLEAN), SegmentSection())
    assert len(asked.keys) == len(shards)
    assert asked.task.truth.tolist() == [1] + [0] * (len(shards) - 1)
    asked = read_target(shards, masks(shards, [FOUND, BARE], CLEAN), SegmentSection(unmasked="left_out"))
    assert 1 not in asked.task.chosen
    assert asked.notes[0] == "Left out, as there is no mask: 1 image."
    assert 1 not in read_target(shards, masks(shards, [TISSUE, BARE], TISSUE), SegmentSection()).task.chosen


def test_an_image_whose_masks_are_incomplete_counts_nowhere(shards: ShardDataset) -> None:
    partly = Held("instances", False, {0: 50, 1: 50})
    asked = read_target(shards, masks(shards, [FOUND, partly], CLEAN), SegmentSection())
    assert 1 not in asked.task.chosen
    assert "not every mask" in asked.notes[0]


def test_an_image_that_is_ignored_whole_is_no_negative(shards: ShardDataset) -> None:
    unknown = Held("classes", True, {9: 10})
    named = {"none": (0,), "gland": (3,), "ignored": (9,)}
    asked = read_target(shards, masks(shards, [TISSUE, unknown], TISSUE), SegmentSection(classes=named))
    assert 1 not in asked.task.chosen


def test_values_become_classes_as_they_are_named(shards: ShardDataset) -> None:
    found = masks(shards, [], Held("classes", True, {0: 1, 64: 1, 128: 1, 192: 1, 255: 1}))
    named = {"background": (64,), "adipose": (128,), "gland": (192,), "ignored": (255,)}
    target = read_target(shards, found, SegmentSection(classes=named)).target
    assert target.classes == ("background", "adipose", "gland")
    assert target.truth(sample([[0, 64, 128, 192, 255]])).tolist() == [[0, 0, 1, 2, IGNORED]]
    assert not target.lesions


def test_unnamed_values_are_classes_of_their_own_or_refused(shards: ShardDataset) -> None:
    found = masks(shards, [Held("classes", True, {0: 1, 9: 4})], Held("classes", True, {0: 1, 3: 1}))
    assert read_target(shards, found, SegmentSection()).target.classes == ("background", "3", "9")
    with pytest.raises(UserError, match=r"masks hold 9 \(in 1 image\), which no class takes"):
        read_target(shards, found, SegmentSection(classes={"none": (0,), "three": (3,)}))


@pytest.mark.parametrize(
    ("first", "rest", "section", "said"),
    [
        (BARE, BARE, {}, "has no masks"),
        (FOUND, Held("classes", True, {0: 1, 1: 1}), {}, "with one --mask-kind"),
        (CLEAN, CLEAN, {}, "nothing to learn"),
        (FOUND, CLEAN, {"classes": {"none": (0,), "lesion": (1,)}}, "these number findings"),
        (FOUND, CLEAN, {"task": "tissues"}, "the masks number findings"),
        (TISSUE, TISSUE, {"threshold": 0.4}, r"^segment\.threshold=0\.4: tissues .* set segment\.task=lesions"),
        (TISSUE, TISSUE, {"lesion": "part"}, r"^segment\.lesion=part: tissues .* set segment\.task=lesions"),
    ],
)
def test_what_cannot_be_segmented_is_refused(
    shards: ShardDataset, first: Held, rest: Held, section: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        read_target(shards, masks(shards, [first], rest), SegmentSection(**section))


@pytest.mark.parametrize(
    "classes",
    [
        {"none": (0,)},
        {"none": (0,), "a": (1,), "b": (1,)},
        {"none": (0,), "a": ()},
        {"ignored": (0,), "a": (1,), "b": (2,)},
    ],
)
def test_classes_that_make_no_sense_are_refused(classes: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match=r"background|needs values"):
        SegmentSection(classes=classes)


def test_classes_that_are_rare_are_lesions_and_those_that_fill_the_image_tissues(shards: ShardDataset) -> None:
    mass = Held("classes", True, {0: 900, 1: 20, 2: 5})
    found = masks(shards, [mass, BARE], Held("classes", True, {0: 1000}))
    asked = read_target(shards, found, SegmentSection())
    assert asked.target.lesions
    assert asked.target.parts
    assert asked.target.classes == ("background", "1", "2")
    assert 1 in asked.task.chosen  # nothing was found there
    assert np.array_equal(asked.target.findings(sample([[1, 0, 1], [2, 2, 0]])), [[1, 0, 2], [3, 3, 0]])
    assert not read_target(shards, found, SegmentSection(task="tissues")).target.lesions
    full = masks(shards, [], Held("classes", True, {0: 500, 1: 500}))
    assert not read_target(shards, full, SegmentSection()).target.lesions
    assert read_target(shards, full, SegmentSection(task="lesions")).target.lesions


def test_parts_of_several_values_of_one_class_that_touch_are_one_lesion(shards: ShardDataset) -> None:
    found = masks(shards, [Held("classes", True, {0: 990, 1: 5, 2: 5})], Held("classes", True, {0: 1000}))
    target = read_target(shards, found, SegmentSection(classes={"none": (0,), "mass": (1, 2)})).target
    assert np.array_equal(target.findings(sample([[1, 2, 0, 2]])), [[1, 1, 0, 2]])


def test_more_values_than_there_are_numbers_for_classes_are_refused(shards: ShardDataset) -> None:
    every = masks(shards, [], Held("classes", True, dict.fromkeys(range(256), 1)))
    with pytest.raises(UserError, match=r"256 classes, and 255 are the most"):
        read_target(shards, every, SegmentSection())


def test_findings_that_cover_most_of_the_images_are_remarked_upon(shards: ShardDataset) -> None:
    """Masks of classes that were ingested as findings: each image would be one great lesion."""
    great = read_target(shards, masks(shards, [], Held("instances", True, {0: 20, 1: 80})), SegmentSection())
    assert "80 % of all pixels" in great.notes[-1]
    assert "--mask-kind classes" in great.notes[-1]
    usual = read_target(shards, masks(shards, [FOUND], CLEAN), SegmentSection())
    assert not any("of all pixels" in note for note in usual.notes)


def test_masks_are_looked_at_once(shards: ShardDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = survey(shards, tmp_path)
    for i in (0, 17, 40):
        mask = shards[i].mask
        assert first[i].values == {int(v): int((mask == v).sum()) for v in np.unique(mask)}
    monkeypatch.setattr(ShardDataset, "__getitem__", None)
    assert survey(shards, tmp_path) == first
