"""One training and what is judged by it, on one rank and on several."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from ranks import on_ranks
from segments import encoder_at, run

from miram.data.shards import ShardDataset
from miram.engine.errors import RunFailed, UserError
from miram.finetune.segment import fits, stage
from miram.finetune.segment.config import SegmentSection
from miram.finetune.segment.fits import rules_of
from miram.finetune.segment.locked import read_segmenter


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoder_at(tmp_path_factory.mktemp("fits") / "encoder")


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pictures."""
    monkeypatch.setattr(stage, "draw_figures", lambda *a: {})


def test_marks_begin_below_the_threshold_of_masks() -> None:
    section = SegmentSection(hit_iou=0.2)
    assert rules_of(section).floor == rules_of(section, (0.5, 0.3)).floor == 0.05
    assert rules_of(section, (0.5, 0.02)).floor == 0.01
    assert rules_of(section, (0.02,)).iou == 0.2


@pytest.mark.slow
def test_the_kept_model_says_what_every_rank_said_also_with_running_statistics(
    phantoms: Path, encoder: Path, tmp_path: Path
) -> None:
    """DDP gives ranks the same statistics before a step only: after the last one each has its own."""
    changes: dict[str, Any] = {"model": "linear", "model_options": {}, "train": {"steps": 3}, "threshold": 0.02}
    ended = on_ranks(2, lambda: str(run(phantoms, tmp_path / "two", encoder, **changes)))
    assert not [one for one in ended if isinstance(one, Exception)]
    segmenter, shards = read_segmenter(tmp_path / "two"), ShardDataset(phantoms)
    keys = {row["key"]: i for i, row in enumerate(shards.rows)}
    said = {path.stem: np.asarray(Image.open(path)) for path in (tmp_path / "two" / "masks").glob("*.png")}
    assert len(said) == 24
    for key, mask in said.items():
        assert np.array_equal(segmenter.mask(segmenter.probabilities(shards[keys[key]])), mask), key


@pytest.mark.slow
def test_where_one_rank_cannot_judge_all_stop_and_say_so(
    phantoms: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = fits.read_image

    def broken(*arguments: Any) -> Any:
        found = read(*arguments)
        return found * np.float32("nan") if os.environ.get("RANK") == "1" else found

    monkeypatch.setattr(fits, "read_image", broken)
    ended = on_ranks(2, lambda: run(phantoms, tmp_path / "two", encoder, train={"steps": 1}, threshold=0.5))
    assert all(isinstance(one, RunFailed | UserError) for one in ended), ended
    assert "no finite numbers" in str(ended[1])
    assert "another rank cannot go on" in str(ended[0])


def test_what_a_kill_left_of_a_finished_fit_is_removed(phantoms: Path, encoder: Path, tmp_path: Path) -> None:
    """Between its last word and the removal of what it needs no longer: checkpoints are gigabytes."""
    changes: dict[str, Any] = {"data": {"split": "train"}, "folds": 2, "final": False, "threshold": 0.5}
    folder = run(phantoms, tmp_path / "run", encoder, train={"steps": 1}, **changes).folder
    left = [folder / "fits/outer-0" / name for name in ("checkpoints", "judged-1")]
    for one in left:
        one.mkdir()
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"status": "failed"}))
    run(phantoms, tmp_path / "run", encoder, train={"steps": 1}, **changes)
    assert not [one for one in left if one.exists()]
