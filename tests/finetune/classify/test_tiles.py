"""Cached tile features against the encoder itself; which file is taken; and what is refused before hours are spent."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from respaced import changed
from vits import small

from miram.data.shards import ShardDataset
from miram.data.tiles import tiles
from miram.engine.errors import UserError
from miram.finetune.classify.config import TilesSection
from miram.finetune.classify.tiles import TileFeatures, spacings, tile_features
from miram.pretrain.encoder import Encoder, normalisation

MM = 2.5  # of phantoms of 96 pixels
SECTION = TilesSection(mm_per_pixel=MM, overlap=0.25, tissue=0.2)


@pytest.fixture(scope="module")
def shards(phantoms: Path) -> ShardDataset:
    return ShardDataset(phantoms, "train")


@pytest.fixture(scope="module")
def vit() -> Encoder:
    return small(image=(32, 48))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiles")


@pytest.fixture(scope="module")
def features(vit: Encoder, shards: ShardDataset, folder: Path) -> TileFeatures:
    return tile_features(vit, shards, SECTION, 7, folder, "test")


def test_features_are_means_of_patch_tokens_of_the_tiles_in_their_boxes(
    vit: Encoder, shards: ShardDataset, features: TileFeatures
) -> None:
    assert features.dim == 48
    assert len(features.counts) == len(shards)
    for i in (0, 5, len(shards) - 1):
        expected, cut = tiles(shards[i], (32, 48), MM, MM, 0.25, 0.2, normalisation(vit))
        with torch.no_grad():
            tokens = vit.forward_features(torch.stack(list(cut)))
        np.testing.assert_array_equal(features.boxes(i), expected)
        np.testing.assert_allclose(features.tiles(i), tokens[:, 1:].mean(1), rtol=1e-4, atol=1e-5)
        assert features.counts[i] == len(expected) > 1


def test_what_the_index_says_of_a_spacing_wins_and_what_the_user_says_fills_gaps(
    vit: Encoder, phantoms: Path, tmp_path: Path
) -> None:
    mixed = changed(phantoms, tmp_path / "mixed", {0: "1.25", 1: ""})
    section = SECTION.model_copy(update={"spacing_mm": 2.0})
    assert spacings(mixed, section)[:3] == [1.25, 2.0, 2.5]
    found = tile_features(vit, mixed, section, 16, tmp_path, "test")
    sides = [found.boxes(i)[0, 2] / 32 for i in range(3)]
    assert sides == pytest.approx([2.0, 1.25, 1.0])


def test_no_spacing_nonsense_and_detail_that_is_not_stored_are_refused(
    vit: Encoder, phantoms: Path, tmp_path: Path
) -> None:
    none = changed(phantoms, tmp_path / "none", {3: "", 5: ""})
    with pytest.raises(UserError, match=r"^2 of 48 images have no spacing_mm .*set finetune\.tiles\.spacing_mm to"):
        tile_features(vit, none, SECTION, 16, tmp_path / "out", "test")
    for number, nonsense in enumerate(("wide", "nan", "-0.1", "0", "inf")):
        odd = changed(phantoms, tmp_path / f"odd{number}", {3: nonsense})
        with pytest.raises(UserError, match=f"spacing_mm '{nonsense}', which is no length"):
            tile_features(vit, odd, SECTION, 16, tmp_path / "out", "test")
    coarse = changed(phantoms, tmp_path / "coarse", {3: "3.1", 5: "2.9"})
    with pytest.raises(
        UserError, match=r"2\.5 is finer than the data: 2 of 48 .*3\.1 mm.*set finetune\.tiles\.mm_per_pixel=3\.1"
    ):
        tile_features(vit, coarse, SECTION, 16, tmp_path / "out", "test")
    colour = small(image=32, in_chans=3)
    with pytest.raises(UserError, match="3 channels and the data has 1"):
        tile_features(colour, coarse, SECTION, 16, tmp_path / "out", "test")
    assert not (tmp_path / "out").exists()


def test_the_same_tiles_are_read_and_not_computed_again(
    vit: Encoder, shards: ShardDataset, features: TileFeatures, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("miram.finetune.classify.tiles.extract", None)
    again = tile_features(copy.deepcopy(vit), shards, SECTION, 16, folder, "another name")
    assert again.path == features.path
    untouched = {"width": 64, "dropout": 0.0, "steps": 3, "batch_size": 2, "bag": "image", "spacing_mm": 0.3}
    same = tile_features(
        vit, shards, SECTION.model_copy(update=untouched), 16, folder, "test"
    )  # every image says its own
    assert same.path == features.path


@pytest.mark.parametrize(
    "change", [{"mm_per_pixel": 3.0}, {"overlap": 0.0}, {"tissue": 0.5}, "weights", "data", "rows"]
)
def test_whatever_changes_tiles_changes_the_file(
    change: Any, vit: Encoder, shards: ShardDataset, features: TileFeatures, phantoms: Path, tmp_path: Path
) -> None:
    other, data, section = copy.deepcopy(vit), shards, SECTION
    if change == "weights":
        with torch.no_grad():
            other.blocks[1].mlp.fc1.bias[3] += 1e-6
    elif change == "data":
        data = changed(phantoms, tmp_path / "spaced", {-1: "2.4"})
    elif change == "rows":
        data = ShardDataset(phantoms)
    else:
        section = SECTION.model_copy(update=change)
    found = tile_features(other, data, section, 16, tmp_path, "test")
    assert found.path.name != features.path.name


def test_a_stated_spacing_is_part_of_the_key(vit: Encoder, phantoms: Path, tmp_path: Path) -> None:
    unknown = changed(phantoms, tmp_path / "unknown", {-1: ""})
    stated = [SECTION.model_copy(update={"spacing_mm": mm}) for mm in (2.5, 2.0, 2.5)]
    first, second, third = (tile_features(vit, unknown, section, 16, tmp_path, "test") for section in stated)
    assert first.path == third.path != second.path
    assert not np.array_equal(first.boxes(0), second.boxes(0))


@pytest.mark.parametrize("damage", ["cut", "bit", "no json", "bad json"])
def test_a_damaged_file_is_made_again(
    damage: str, vit: Encoder, shards: ShardDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = tile_features(vit, shards, SECTION, 16, tmp_path, "test")
    expected, boxes, card = first.tiles(3), first.boxes(3), first.path.with_suffix(".json")
    content = bytearray(first.path.read_bytes())
    if damage == "cut":
        first.path.write_bytes(content[:-4])
    elif damage == "bit":
        content[-1000] ^= 64
        first.path.write_bytes(content)
    elif damage == "no json":
        card.unlink()
    else:
        card.write_text("{")
    again = tile_features(vit, shards, SECTION, 16, tmp_path, "test")
    assert np.array_equal(again.tiles(3), expected)
    assert np.array_equal(again.boxes(3), boxes)
    assert "damaged" in capsys.readouterr().err


def test_features_that_are_not_finite_are_refused_and_leave_nothing(shards: ShardDataset, tmp_path: Path) -> None:
    broken = small(image=32)
    with torch.no_grad():
        broken.norm.bias += torch.inf
    with pytest.raises(UserError, match=r"test.* not finite"):
        tile_features(broken, shards, SECTION, 16, tmp_path, "test")
    assert [p.name for p in tmp_path.iterdir() if p.suffix != ".lock"] == []


def test_no_more_than_a_batch_of_tiles_is_there_at_once(
    vit: Encoder, shards: ShardDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_so_far, encoded, waiting = [0], [0], []

    def counted(*arguments: Any) -> Any:
        def one_by_one() -> Iterator[torch.Tensor]:
            for tile in cut:
                cut_so_far[0] += 1
                yield tile

        boxes, cut = tiles(*arguments)
        return boxes, one_by_one()

    def forward(images: torch.Tensor, **options: Any) -> Any:
        waiting.append(cut_so_far[0] - encoded[0])
        encoded[0] += len(images)
        return unwatched(images, **options)

    unwatched = vit.forward_intermediates
    monkeypatch.setattr("miram.finetune.classify.tiles.tiles", counted)
    monkeypatch.setattr(vit, "forward_intermediates", forward)
    found = tile_features(vit, shards, SECTION, 4, tmp_path, "test")
    assert encoded[0] == found.counts.sum() > 40
    assert max(waiting) == 4
