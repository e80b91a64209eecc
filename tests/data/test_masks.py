"""What masks hold, and what their values become."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from miram.data.findings import IGNORED
from miram.data.masks import Held, all_named, images, lookup_of, names_of
from miram.data.shards import Sample

MASK = np.array([[0, 3, 3], [0, 0, 255]], np.uint8)


@pytest.mark.parametrize(
    ("mask", "meta", "held"),
    [
        (None, {}, Held(None, True, {})),
        (None, {"facts": {"masks": "unreadable"}}, Held(None, False, {})),
        (MASK, {}, Held("instances", True, {0: 3, 3: 2, 255: 1})),
        (MASK, {"mask_kind": "classes", "facts": {"masks": "1 of 2"}}, Held("classes", False, {0: 3, 3: 2, 255: 1})),
    ],
)
def test_a_sample_tells_what_its_mask_holds(mask: Any, meta: dict[str, Any], held: Held) -> None:
    assert Held.of(Sample("k", np.zeros((2, 3), np.uint8), 255, meta, mask)) == held


def test_every_finding_is_a_lesion() -> None:
    named = all_named("instances", [Held("instances", True, {0: 1, 200: 1})], None, "--classes")
    assert names_of(named) == ("background", "lesion")
    assert np.array_equal(lookup_of(named), np.arange(256) > 0)


def test_what_is_ignored_is_neither_background_nor_a_class() -> None:
    named = {"none": (7,), "ignored": (255,), "fat": (3,)}
    lookup = lookup_of(named)
    assert names_of(named) == ("none", "fat")
    assert lookup[[0, 7, 255, 3]].tolist() == [0, 0, IGNORED, 1]
    for values, counts, positive in (({255: 9}, False, False), ({7: 1}, True, False), ({255: 9, 3: 1}, True, True)):
        held = Held("classes", True, values)
        assert (held.counts(lookup, unmasked=True), held.positive(lookup)) == (counts, positive)
    assert not Held("classes", False, {3: 1}).counts(lookup, unmasked=True)


def test_one_is_no_plural() -> None:
    assert [images(n) for n in (0, 1, 2)] == ["0 images", "1 image", "2 images"]
