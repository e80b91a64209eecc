"""A locked segmenter: what is read is what was written, and what is none, or not whole, is refused with what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lockables import lock as lock_classifier
from lockables import write_encoder
from segments import config, encoder_at

from miram.data.shards import Sample, ShardDataset
from miram.engine.errors import UserError
from miram.engine.files import write_json
from miram.engine.launch import make_accelerator
from miram.engine.run import STATE
from miram.engine.signals import StopSignals
from miram.finetune.classify.locked import read_locked
from miram.finetune.sealed import CARD, SEGMENTER, seal, stage_of, whole_folder
from miram.finetune.segment.locked import SegmentCard, Segmenter, read_segmenter, write_segmenter
from miram.finetune.segment.stage import card_for, prepare

NARROW: dict[str, Any] = {"model": "unet", "model_options": {"channels": [8, 8, 16, 16, 16]}, "image_size": [64, 32]}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoder_at(tmp_path_factory.mktemp("locked") / "encoder")


@pytest.fixture(scope="module")
def shards(phantoms: Path) -> ShardDataset:
    return ShardDataset(phantoms, "test")


Lock = Callable[..., Segmenter]


@pytest.fixture(scope="module")
def lock(phantoms: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Lock:
    """Leaves a model that learnt nothing in RUN/model, as a finished run of the stage would, and returns it."""
    cache = tmp_path_factory.mktemp("masks")

    def made(
        run: Path, of: Path | None = encoder, thresholds: tuple[float, ...] = (0.37,), **changes: Any
    ) -> Segmenter:
        bench, *_ = prepare(config(phantoms, run, of, **changes), make_accelerator(), StopSignals(), cache)
        model = bench.fresh(5).eval()
        with torch.no_grad():  # not shy: at first all is background
            for tensor in model.parameters():
                if tensor.requires_grad:
                    tensor += 0.05 * torch.randn_like(tensor)
        run.mkdir(parents=True, exist_ok=True)
        (run / "config.yaml").write_text("out: here\n")
        write_json(run / "state.json", STATE, {"stage": "segment", "status": "finished", "reason": ""})
        card = write_segmenter(run / "model", card_for(bench, np.arange(24), thresholds), model)
        return Segmenter(card, model)

    return made


@pytest.fixture(scope="module")
def run(lock: Lock, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "segment"
    lock(folder)
    return folder


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(run, tmp_path / "copy")


@pytest.fixture(scope="module")
def classifier(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of `miram finetune`."""
    folder = tmp_path_factory.mktemp("classifier")
    lock_classifier(folder / "run", phantoms, write_encoder(folder / "encoder"))
    return folder / "run"


def said(of: Segmenter, shards: ShardDataset) -> np.ndarray:
    return of.probabilities(shards[0])


# ---------------------------------------------------------------------------------------------- what comes back


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "lora"},
        {"method": "full"},
        {"control": "untrained"},
        {"control": "zeroed"},
        {"model": "linear", "model_options": {}},
        {"of": None, **NARROW},
    ],
)
def test_a_model_that_is_read_says_what_the_written_one_did(
    changes: dict[str, Any], lock: Lock, shards: ShardDataset, tmp_path: Path
) -> None:
    written = lock(tmp_path / "run", **changes)
    state = torch.random.get_rng_state()
    read = read_segmenter(tmp_path / "run")
    assert torch.equal(state, torch.random.get_rng_state())
    assert np.array_equal(said(read, shards), said(written, shards))
    assert said(read, shards)[1].std() > 1e-4
    assert (read.card, read.digest) == (written.card, written.digest)
    assert not any(tensor.requires_grad for tensor in read.model.parameters())
    assert not read.model.training


def test_a_model_folder_alone_is_enough(run: Path, shards: ShardDataset, tmp_path: Path) -> None:
    alone = shutil.copytree(run / "model", tmp_path / "alone")
    assert read_segmenter(alone).digest == read_segmenter(run).digest
    assert np.array_equal(said(read_segmenter(alone), shards), said(read_segmenter(run), shards))


def test_the_mask_is_by_the_threshold_of_the_card(run: Path, shards: ShardDataset) -> None:
    segmenter = read_segmenter(run)
    found = said(segmenter, shards)
    assert not segmenter.mask(found).any(), "nothing is as likely as 0.37"
    half = float(np.median(found[1]))
    other = Segmenter(segmenter.card.model_copy(update={"thresholds": (half,)}), segmenter.model)
    assert np.array_equal(other.mask(found), found[1] >= np.float32(half))
    assert 0.3 < other.mask(found).mean() < 0.7


def test_the_digest_is_another_for_another_threshold_or_weight(lock: Lock, run: Path, tmp_path: Path) -> None:
    same, other = lock(tmp_path / "same"), lock(tmp_path / "other", thresholds=(0.38,))
    mine = read_segmenter(run).card
    assert same.digest == mine.digest
    assert other.digest != mine.digest
    assert other.card.files == mine.files
    for change in ({"smallest": 5}, {"overlap": 0.5}, {"flips": ()}, {"image_size": (64, 64)}, {"files": {}}):
        assert mine.model_copy(update=change).own_digest() != mine.digest
    assert len(mine.digest) == 64


def test_the_card_says_whose_images_it_knows_and_nothing_of_where_they_lay(run: Path, phantoms: Path) -> None:
    card, shards = read_segmenter(run).card, ShardDataset(phantoms)
    assert (card.trained_on.images, card.trained_on.patients) == (24, len(set(shards.rows.column("patient")[:24])))
    assert set(card.trained_on.of) == set(shards.rows.column("patient")[:24])
    assert (card.classes, card.kind, card.channels) == (("background", "lesion"), "instances", 1)
    assert str(phantoms) not in (run / "model" / CARD).read_text()


def test_a_model_is_written_over_one_of_an_earlier_start(lock: Lock, tmp_path: Path) -> None:
    """Of another kind, so that nothing of the earlier may stay."""
    lock(tmp_path / "run")
    assert (tmp_path / "run" / "model" / "adapter").is_dir()
    lock(tmp_path / "run", of=None, **NARROW)
    assert sorted(path.name for path in (tmp_path / "run" / "model").iterdir()) == [CARD, "network.safetensors"]
    assert read_segmenter(tmp_path / "run").card.encoder is None
    assert not list((tmp_path / "run").glob(".model*"))


# ---------------------------------------------------------------------------------------------- the encoder


@pytest.mark.parametrize("control", [None, "zeroed", "untrained"])
def test_a_moved_encoder_is_asked_for_and_taken(
    control: str | None, lock: Lock, encoder: Path, shards: ShardDataset, tmp_path: Path
) -> None:
    here = shutil.copytree(encoder.parent, tmp_path / "here")
    written = lock(tmp_path / "run", here / "encoder.safetensors", control=control)
    there = here.rename(tmp_path / "there")
    with pytest.raises(UserError, match=r"here/encoder\.safetensors.*say with --encoder where it lies now"):
        read_segmenter(tmp_path / "run")
    for named in (there, there / "encoder.safetensors"):
        assert np.array_equal(said(read_segmenter(tmp_path / "run", str(named)), shards), said(written, shards))


def test_an_encoder_that_is_not_where_it_was_said_to_be_is_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        read_segmenter(run, str(tmp_path / "nowhere"))


def test_another_encoder_is_refused_by_its_weights_and_by_its_shape(run: Path, encoder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    other = shutil.copytree(encoder.parent, tmp_path / "other")
    weights = load_file(encoder)
    name = next(name for name in weights if name.endswith("attn.qkv.weight"))
    weights[name][0, 0] += 1e-3
    save_file(weights, other / "encoder.safetensors")
    with pytest.raises(UserError, match=r"other is not the encoder .*\(digest .*name that one with --encoder"):
        read_segmenter(run, str(other))
    narrow = write_encoder(tmp_path / "narrow")
    with pytest.raises(UserError, match="is not the encoder"):
        read_segmenter(run, str(narrow))


def test_a_network_of_its_own_wants_no_encoder(lock: Lock, shards: ShardDataset, tmp_path: Path) -> None:
    written = lock(tmp_path / "run", of=None, **NARROW)
    read = read_segmenter(tmp_path / "run", str(tmp_path / "nowhere"))
    assert np.array_equal(said(read, shards), said(written, shards))


# ---------------------------------------------------------------------------------------------- refusals


def test_what_is_no_finished_run_is_refused(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not there; name the folder that `miram segment` wrote"):
        read_segmenter(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"is no run.*`miram segment`"):
        read_segmenter(tmp_path)
    for status in ("running", "preempted", "failed"):
        write_json(copy / "state.json", STATE, {"stage": "segment", "status": status})
        with pytest.raises(UserError, match=rf"is not finished \({status}\); repeat the command"):
            read_segmenter(copy)
    (copy / "state.json").unlink()
    with pytest.raises(UserError, match=r"is not finished \(not begun\)"):
        read_segmenter(copy)
    write_json(copy / "state.json", STATE, {"stage": "segment", "status": "finished"})
    shutil.rmtree(copy / "model")
    with pytest.raises(UserError, match=r"kept no model \(segment\.final was off"):
        read_segmenter(copy)


def test_a_run_of_another_stage_says_which_command_makes_what_is_wanted(copy: Path, classifier: Path) -> None:
    write_json(copy / "state.json", STATE, {"stage": "probe", "status": "finished"})
    with pytest.raises(UserError, match=r"is a run of `miram probe`, which makes no such model.*`miram segment`"):
        read_segmenter(copy)
    with pytest.raises(UserError, match=r"is a run of `miram finetune`, .*`miram segment`"):
        read_segmenter(classifier)
    write_json(copy / "state.json", STATE, {"stage": "segment", "status": "finished"})
    with pytest.raises(UserError, match=r"is a run of `miram segment`, .*`miram finetune`"):
        read_locked(copy)


def test_a_models_folder_of_another_stage_says_so_too(run: Path, classifier: Path) -> None:
    with pytest.raises(UserError, match="model is a model of `miram finetune`; name one of `miram segment`"):
        read_segmenter(classifier / "model")
    with pytest.raises(UserError, match="model is a model of `miram segment`; name one of `miram finetune`"):
        read_locked(run / "model")


@pytest.mark.parametrize("read", [read_segmenter, read_locked])
def test_of_a_sweep_one_of_its_runs_is_to_be_named(read: Callable[[Path], Any], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("out: here\n")
    write_json(tmp_path / "state.json", STATE, {"stage": "sweep", "status": "finished"})
    with pytest.raises(UserError, match="is a sweep; name one of the runs in its folder cells"):
        read(tmp_path)


def test_any_byte_that_is_not_as_it_was_written_is_found(copy: Path) -> None:
    files = [path for path in (copy / "model").rglob("*") if path.is_file()]
    assert len(files) >= 3
    for path in files:
        content = path.read_bytes()
        for place in (len(content) // 3, 2 * len(content) // 3):
            damaged = bytearray(content)
            damaged[place] ^= 1
            path.write_bytes(damaged)
            with pytest.raises(UserError, match=path.name):
                read_segmenter(copy)
        path.write_bytes(content)
    read_segmenter(copy)


def test_an_edited_threshold_is_found(copy: Path) -> None:
    path = copy / "model" / CARD
    path.write_text(path.read_text().replace("0.37", "0.73"))
    with pytest.raises(UserError, match="damaged or was edited"):
        read_segmenter(copy)


def test_a_missing_file_is_named(copy: Path, tmp_path: Path) -> None:
    card = SegmentCard(**{**read_segmenter(copy).card.model_dump(), "files": {}, "digest": ""})
    (copy / "model" / "network.safetensors").unlink()
    with pytest.raises(UserError, match=r"network\.safetensors is missing"):
        read_segmenter(copy)
    with whole_folder(tmp_path / "empty") as part:
        seal(part, SEGMENTER, card)  # whole by its own account
    with pytest.raises(UserError, match=r"empty/network\.safetensors is missing"):
        read_segmenter(tmp_path / "empty")


def test_images_of_other_channels_are_refused(run: Path) -> None:
    colour = Sample("film", np.zeros((80, 60, 3), np.uint8), 255, {})
    with pytest.raises(UserError, match=r"sample film has 3 channels, and the model takes 1; .*--channels 1"):
        read_segmenter(run).probabilities(colour)


def test_what_is_a_segmenter_is_told_from_the_rest_whatever_state_it_is_in(
    copy: Path, classifier: Path, tmp_path: Path
) -> None:
    assert stage_of(copy) == "segment"
    assert stage_of(str(copy / "model")) == "segment"
    shutil.rmtree(copy / "model")
    assert stage_of(copy) == "segment", "by its state, which read_segmenter then finds wanting"
    for other in (classifier, classifier / "model", tmp_path / "nowhere", tmp_path):
        assert stage_of(other) != "segment"
    for damaged in ("", "{", "[]", "null"):
        (copy / "state.json").write_text(damaged)
        assert stage_of(copy) != "segment"
        (copy / CARD).write_text(damaged)
        assert stage_of(copy) != "segment"
        (copy / CARD).unlink()
    assert json.loads((classifier / "state.json").read_text())["stage"] == "finetune"
