"""Which judged images an encoder, or one that it comes from, was pretrained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vits import small

from miram.data.config import DataSection
from miram.data.shards import ShardDataset
from miram.finetune.seen import images_seen, lineage, seen
from miram.pretrain.encoder import EncoderCard, save_encoder

KWARGS = {"in_chans": 1, "num_classes": 0, "img_size": [64, 32], "depth": 2, "embed_dim": 48, "num_heads": 4}


@pytest.fixture(scope="module")
def shards(phantoms: Path) -> ShardDataset:
    return ShardDataset(phantoms)


def saw(shards: ShardDataset, split: str | None) -> dict[str, Any]:
    """The provenance of a pretraining on a split of this data."""
    data = [{key: manifest[key] for key in ("dataset", "licence", "records")} for manifest in shards.manifests]
    return {"data": data, "split": split, "split_digest": shards.split_digest, "fold": None}


def count(folder: Path, shards: ShardDataset, provenance: dict[str, Any]) -> int | None:
    """How many of all images an encoder with this provenance saw."""
    save_encoder(
        folder, small(image=(64, 32)), EncoderCard(architecture="vit_tiny", kwargs=KWARGS, provenance=provenance)
    )
    section = DataSection(shards=shards.roots[0], split=None)
    return images_seen(shards, section, str(folder), range(len(shards)))


@pytest.mark.parametrize("kin", ["teacher", "init"])
def test_what_a_teacher_or_a_start_saw_counts_as_seen(kin: str, shards: ShardDataset, tmp_path: Path) -> None:
    splits = list(shards.splits)
    own = saw(shards, "train")
    assert count(tmp_path, shards, own) == splits.count("train")
    assert count(tmp_path, shards, own | {kin: saw(shards, "test")}) == len(splits)
    assert count(tmp_path, shards, own | {kin: saw(shards, "train")}) == splits.count("train")
    assert count(tmp_path, shards, {kin: {"from": "x", kin: saw(shards, "test")}}) == splits.count("test")


def test_of_a_teacher_with_another_split_it_cannot_be_told(shards: ShardDataset, tmp_path: Path) -> None:
    other = saw(shards, "train") | {"split_digest": "another"}
    assert count(tmp_path, shards, saw(shards, "train") | {"teacher": other}) is None


def test_a_lineage_is_all_that_an_encoder_comes_from() -> None:
    tree = {"n": 1, "init": {"n": 2, "teacher": {"n": 3}}, "teacher": {"n": 4, "init": None}}
    assert [each["n"] for each in lineage(tree)] == [1, 2, 3, 4]


def test_a_student_that_saw_nothing_itself_is_not_said_to_have_seen_nothing(
    shards: ShardDataset, tmp_path: Path
) -> None:
    count(tmp_path, shards, saw(shards, "train") | {"teacher": saw(shards, "test")})
    told = seen(shards, DataSection(shards=shards.roots[0], split=None), str(tmp_path), range(len(shards)))
    assert f"saw {len(shards)} of the {len(shards)} judged images" in told
