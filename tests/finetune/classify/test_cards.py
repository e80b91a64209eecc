"""What a card knows of how films became images: only what changes pixels counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lockables import lock, write_encoder

from miram.data.derive import derive
from miram.data.geometry import Size
from miram.data.phantom import PhantomSettings
from miram.data.shards import ShardDataset
from miram.data.sources.phantom import make_phantoms
from miram.finetune.classify.cards import ModelCard, other_settings


@pytest.fixture(scope="module")
def card(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelCard:
    folder = tmp_path_factory.mktemp("cards")
    tiles = {"mm_per_pixel": 2.5, "spacing_mm": 2.5}
    encoder = write_encoder(folder / "encoder")
    return lock(folder / "run", phantoms, encoder, input="tiles", method="linear", tiles=tiles)[1]


def test_another_seed_is_no_other_way_to_make_images_of_films(card: ModelCard, tmp_path: Path) -> None:
    make_phantoms(tmp_path / "other", 4, PhantomSettings(size=96, seed=1), workers=1)
    manifest = ShardDataset(tmp_path / "other").manifests[0]
    assert manifest["preprocessing"] not in card.preprocessing
    assert other_settings(card, manifest) == ""


def test_what_changes_pixels_is_named_with_both_values(card: ModelCard, phantoms: Path, tmp_path: Path) -> None:
    derive(str(phantoms), tmp_path / "small", Size(max_size=48), packed=False, workers=1)
    manifest = ShardDataset(tmp_path / "small").manifests[0]
    assert other_settings(card, manifest) == "ingested with max_size 48; the training data with max_size None"
    how = ShardDataset(phantoms).manifests[0]["preprocessing"]
    for said, changed in (
        ("level roi", {"level": "roi"}),
        ("breast False", {"breast": False}),
        ("dicom.voi none", {"dicom": {"voi": "none"}}),
    ):
        assert said in other_settings(card, {"preprocessing": how | changed}), said
    for changed in ({"masks": "classes"}, {"burned_in": True}, {"dicom": {"any_modality": True}}):
        assert other_settings(card, {"preprocessing": how | changed}) == ""
    assert "not said" in other_settings(card, {})


def test_a_stated_spacing_is_of_the_training_data_alone(card: ModelCard, phantoms: Path, tmp_path: Path) -> None:
    assert card.stated_spacing(ShardDataset(phantoms, "test")) == 2.5
    derive(str(phantoms), tmp_path / "small", Size(max_size=48), packed=False, workers=1)
    assert card.stated_spacing(ShardDataset(tmp_path / "small")) is None
    derive(str(phantoms), tmp_path / "same", Size(), packed=True, workers=1)
    assert card.stated_spacing(ShardDataset(tmp_path / "same")) == 2.5
    manifest = json.loads((tmp_path / "same" / "manifest.json").read_text())
    (tmp_path / "same" / "manifest.json").write_text(json.dumps(manifest | {"dataset": "foreign"}))
    assert card.stated_spacing(ShardDataset(tmp_path / "same")) is None
