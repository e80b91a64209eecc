"""A locked model: what is read is what was written, it judges each image alone, and nothing damaged gets through."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from lockables import lock, write_encoder
from respaced import changed

from miram.data.frames import frames
from miram.data.phantom import PhantomSettings
from miram.data.shards import ShardDataset
from miram.data.sources.phantom import make_phantoms
from miram.data.views import Normalisation
from miram.engine.errors import UserError
from miram.engine.files import write_json
from miram.engine.run import STATE
from miram.finetune.classify.locked import Locked, read_locked
from miram.finetune.classify.reading import frame_logits


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("locked") / "encoder")


@pytest.fixture(scope="module")
def run(encoder: Path, phantoms: Path) -> Path:
    folder = encoder.with_name("run")
    lock(folder, phantoms, encoder, thresholds={"image": (0.83,), "breast": (0.7,), "patient": (0.6,)})
    return folder


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(run, tmp_path / "run")


@pytest.fixture(scope="module")
def shards(phantoms: Path) -> ShardDataset:
    return ShardDataset(phantoms, "test")


def by_hand(locked: Locked, shards: ShardDataset, row: int) -> np.ndarray:
    """Logits of an image: its frame by its own arithmetic, one forward pass."""
    pixels, size = np.asarray(shards[row].pixels, np.float64), locked.card.image_size
    seen = frames(shards[row], size, Normalisation(0.0, 1.0), "whole")
    assert seen.max() * shards[row].max_value <= pixels.max() + 1e-3
    with torch.no_grad():
        return locked.model((seen - 0.2) / 0.3)[0].double().numpy()


def test_a_model_that_is_read_gives_what_the_written_one_did(encoder: Path, phantoms: Path, tmp_path: Path) -> None:
    shards, rows = ShardDataset(phantoms), np.arange(9)
    for method in ("linear", "full", "lora", "vpt_deep", "savit"):
        written, card = lock(tmp_path / method, phantoms, encoder, method=method)
        read = read_locked(tmp_path / method)
        assert np.array_equal(read.logits(shards, rows), written.logits(shards, rows)), method
        assert read.digest == card.digest
        assert read.card == card


def test_logits_are_the_models_own_in_the_order_of_the_rows(run: Path, shards: ShardDataset) -> None:
    locked, rows = read_locked(run), np.array([5, 0, 3])
    found = locked.logits(shards, rows, batch_size=2)
    assert np.allclose(found, [by_hand(locked, shards, row) for row in rows], atol=1e-4)


def test_what_is_said_of_an_image_does_not_depend_on_the_others_or_the_batch(run: Path, shards: ShardDataset) -> None:
    locked, rows = read_locked(run), np.arange(len(shards))
    together = locked.probabilities(shards, rows, 64)
    alone = np.concatenate([locked.probabilities(shards, rows[i : i + 1]) for i in range(len(rows))])
    assert np.allclose(together, alone, atol=1e-6)
    assert np.allclose(together, locked.probabilities(shards, rows[::-1], 5)[::-1], atol=1e-6)


def test_normalisation_comes_from_the_card_whatever_the_encoders_file_says_later(
    run: Path, encoder: Path, shards: ShardDataset, tmp_path: Path
) -> None:
    moved = shutil.copytree(encoder, tmp_path / "moved")
    card = json.loads((moved / "encoder.json").read_text())
    (moved / "encoder.json").write_text(json.dumps(card | {"mean": [0.9], "std": [0.01]}))
    rows = np.arange(4)
    assert np.array_equal(read_locked(run, str(moved)).logits(shards, rows), read_locked(run).logits(shards, rows))


def test_windows_are_averaged(encoder: Path, phantoms: Path, tmp_path: Path, shards: ShardDataset) -> None:
    locked, _ = lock(tmp_path / "run", phantoms, encoder, input="windows")
    seen = frames(shards[0], (32, 32), Normalisation(0.2, 0.3), "windows")
    assert len(seen) > 1
    with torch.no_grad():
        expected = locked.model(seen).double().mean(0).numpy()
    assert np.allclose(locked.logits(shards, np.array([0]), batch_size=1)[0], expected, atol=1e-5)


def test_reading_leaves_a_model_in_the_mode_it_was_in(run: Path, shards: ShardDataset) -> None:
    model = read_locked(run).model.train()
    frame_logits(model, shards, np.array([0]), "whole", (32, 32), Normalisation(0.2, 0.3), 4)
    assert model.training


def test_temperature_and_thresholds_are_those_of_the_card(run: Path, shards: ShardDataset) -> None:
    locked, rows = read_locked(run), np.arange(12)
    logits = locked.logits(shards, rows) / 1.7
    expected = 1 / (1 + np.exp(logits[:, 0] - logits[:, 1]))
    found = locked.probabilities(shards, rows)
    assert np.allclose(found[:, 1], expected)
    assert (locked.decide(found) == (expected >= 0.83)).all()
    assert (locked.decide(found, "patient") == (expected >= 0.6)).all()


def test_tiles_of_a_breast_are_judged_together_and_an_image_bag_alone(
    encoder: Path, phantoms: Path, tmp_path: Path, shards: ShardDataset
) -> None:
    tiles = {"mm_per_pixel": 2.5, "bag": "breast"}
    lock(tmp_path / "breast", phantoms, encoder, input="tiles", method="linear", tiles=tiles)
    locked = read_locked(tmp_path / "breast")
    side = [row["patient"] + row["laterality"] for row in shards.rows]
    found = locked.logits(shards, np.arange(len(shards))[::-1])[::-1]
    same = np.array([[a == b for a in side] for b in side])
    assert np.array_equal((found[:, None] == found[None]).all(2), same)
    lock(tmp_path / "image", phantoms, encoder, input="tiles", method="linear", tiles=tiles | {"bag": "image"})
    locked = read_locked(tmp_path / "image")
    several, alone = locked.logits(shards, np.array([3, 1])), locked.logits(shards, np.array([1]))
    assert np.allclose(several[1], alone[0], atol=1e-6)


# ---------------------------------------------------------------------------------------------- refusals


def test_any_byte_that_is_not_as_it_was_written_is_found(copy: Path) -> None:
    files = [path for path in (copy / "model").rglob("*") if path.is_file()]
    assert len(files) >= 4
    for path in files:
        content = path.read_bytes()
        for place in (len(content) // 3, len(content) // 2, 2 * len(content) // 3):
            damaged = bytearray(content)
            damaged[place] ^= 1
            path.write_bytes(damaged)
            with pytest.raises(UserError, match=path.name):
                read_locked(copy)
        path.write_bytes(content)
    read_locked(copy)


def test_an_edited_threshold_is_found(copy: Path) -> None:
    path = copy / "model" / "model.json"
    path.write_text(path.read_text().replace("0.83", "0.38"))
    with pytest.raises(UserError, match="damaged or was edited"):
        read_locked(copy)


def test_a_missing_file_is_named(copy: Path) -> None:
    (copy / "model" / "adapter" / "head.safetensors").unlink()
    with pytest.raises(UserError, match=r"head\.safetensors is missing"):
        read_locked(copy)


def test_a_moved_encoder_is_asked_for_and_taken(copy: Path, encoder: Path, phantoms: Path, tmp_path: Path) -> None:
    here = shutil.copytree(encoder, tmp_path / "here")
    lock(tmp_path / "run2", phantoms, here)
    there = here.rename(tmp_path / "there")
    with pytest.raises(UserError, match="--encoder"):
        read_locked(tmp_path / "run2")
    read_locked(tmp_path / "run2", str(there))


def test_another_encoder_is_refused_by_its_digest(run: Path, tmp_path: Path) -> None:
    other = write_encoder(tmp_path / "other", seed=5)
    with pytest.raises(UserError, match="is not the encoder"):
        read_locked(run, str(other))


def test_what_is_no_finished_run_is_refused(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not there"):
        read_locked(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is no run"):
        read_locked(tmp_path)
    for stage, status, said in (("finetune", "preempted", "not finished"), ("probe", "finished", "miram probe")):
        write_json(copy / "state.json", STATE, {"stage": stage, "status": status})
        with pytest.raises(UserError, match=said):
            read_locked(copy)
    write_json(copy / "state.json", STATE, {"stage": "finetune", "status": "finished"})
    shutil.rmtree(copy / "model")
    with pytest.raises(UserError, match="kept no model"):
        read_locked(copy)


def test_a_model_folder_alone_is_enough(run: Path, tmp_path: Path) -> None:
    alone = shutil.copytree(run / "model", tmp_path / "alone")
    assert read_locked(alone).digest == read_locked(run).digest


def test_numbers_that_are_none_say_what_to_do(run: Path, shards: ShardDataset) -> None:
    locked = read_locked(run)
    with torch.no_grad():
        locked.model.head.bias += torch.nan
    with pytest.raises(UserError, match=r"no finite numbers for 2 of 2 images.*finetune\.search\.lrs"):
        locked.logits(shards, np.array([0, 3]))


def test_a_spacing_that_was_stated_of_the_training_data_is_not_taken_for_other_data(
    encoder: Path, phantoms: Path, tmp_path: Path
) -> None:
    trained = changed(phantoms, tmp_path / "trained", {-1: ""})
    tiles = {"mm_per_pixel": 2.5, "spacing_mm": 2.5}
    lock(tmp_path / "run", tmp_path / "trained", encoder, input="tiles", method="linear", tiles=tiles)
    locked, rows = read_locked(tmp_path / "run"), np.arange(4)
    measured = locked.logits(ShardDataset(phantoms), rows)
    assert np.array_equal(locked.logits(trained, rows), measured)
    foreign = changed(phantoms, tmp_path / "foreign", {1: "", 3: "", 5: ""}, "foreign")
    with pytest.raises(UserError, match=r"2 of 4 images cannot be judged.*spacing is unknown.*column spacing_mm"):
        locked.logits(foreign, rows)
    assert np.isfinite(locked.logits(foreign, np.array([0, 2]))).all()
    coarse = changed(phantoms, tmp_path / "coarse", {0: "2.6"})
    with pytest.raises(UserError, match=r"1 of 4 .*2\.6 mm a pixel, coarser than the 2\.5 mm"):
        locked.logits(coarse, rows)


def test_images_of_other_channels_are_refused(phantoms: Path, shards: ShardDataset, tmp_path: Path) -> None:
    colour = write_encoder(tmp_path / "colour", channels=3)
    run = tmp_path / "run"
    lock(run, phantoms, colour)
    with pytest.raises(UserError, match="images of 1 channels, and the model takes 3"):
        read_locked(run).logits(shards, np.array([0]))


def test_the_card_says_whose_images_it_knows_and_how_they_were_made(run: Path, phantoms: Path) -> None:
    card, shards = read_locked(run).card, ShardDataset(phantoms, "train")
    assert set(card.trained_on.of) == set(shards.rows.column("patient"))
    assert (card.trained_on.images, card.trained_on.patients) == (24, 6)
    assert card.preprocessing[0]["breast"] is True
    assert card.preprocessing[0]["phantom"]["size"] == 96
    text = (run / "model" / "model.json").read_text()
    assert "shard-0" not in text


def test_a_model_is_written_over_one_of_an_earlier_start(
    run: Path, phantoms: Path, encoder: Path, tmp_path: Path
) -> None:
    make_phantoms(tmp_path / "few", 8, PhantomSettings(size=64, seed=1), workers=1)
    lock(tmp_path / "run", phantoms, encoder)
    _, card = lock(tmp_path / "run", tmp_path / "few", encoder)
    assert read_locked(tmp_path / "run").digest == card.digest
    assert not list((tmp_path / "run").glob(".model*"))
