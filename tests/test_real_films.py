"""mini-MIAS itself, where `MIRAM_REAL_DATA` names a folder that holds it."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState

from miram.data.ingest import ingest
from miram.data.shards import ShardDataset, verify
from miram.data.sources import read_archive
from miram.engine.run import read_metrics
from miram.finetune.linear import read_task
from miram.pretrain.stage import pretrain

FILMS = Path(os.environ.get("MIRAM_REAL_DATA", "nowhere")) / "mini_mias" / "all-mias"
pytestmark = pytest.mark.skipif(not FILMS.is_dir(), reason="MIRAM_REAL_DATA names no folder with mini_mias/all-mias")


@pytest.fixture(scope="module")
def mias(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("real") / "mias"
    ingest(read_archive("mias", FILMS), out, b"a secret of the test")
    return out


def test_a_hundred_films_of_fifty_patients_are_counted_right(mias: Path) -> None:
    with (mias / "index.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert (len(rows), len({row["patient"] for row in rows})) == (100, 50)
    assert not list(verify(mias))
    task = read_task(ShardDataset(mias), "tissue")
    assert dict(zip(task.classes, np.bincount(task.truth).tolist(), strict=True)) == {"D": 32, "F": 28, "G": 40}


def test_marked_circles_are_brighter_than_what_surrounds_them(mias: Path) -> None:
    """Facts say lesions stand out by some 23 grey levels in the median; a y counted from the top would lose that."""
    shards, contrast, mirrored = ShardDataset(mias), [], []
    for i in range(len(shards)):
        sample = shards[i]
        for circle in sample.meta["circles"]:
            contrast.append(stands_out(sample.pixels, circle, circle["y"]))
            mirrored.append(stands_out(sample.pixels, circle, sample.pixels.shape[0] - 1 - circle["y"]))
    assert len(contrast) >= 30
    assert np.nanmedian(contrast) > 10
    assert np.nanmedian(contrast) > np.nanmedian(mirrored)


def stands_out(pixels: np.ndarray, circle: dict[str, float], y: float) -> float:
    """Mean of the disc minus mean of the ring around it, tissue only; NaN where there is none."""
    rows, columns = np.ogrid[: pixels.shape[0], : pixels.shape[1]]
    distance = np.hypot(rows - y, columns - circle["x"])
    disc = (distance < circle["radius"]) & (pixels > 0)
    ring = (distance > 1.2 * circle["radius"]) & (distance < 2 * circle["radius"]) & (pixels > 0)
    return float(pixels[disc].mean() - pixels[ring].mean()) if disc.any() and ring.any() else float("nan")


def test_the_loss_falls_on_real_films(mias: Path, tmp_path: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    out = tmp_path / "run"
    short = ["--train.steps=12", "--train.warmup_steps=2", "--train.log_every=2", "--data.workers=0"]
    pretrain("pretrain/mias_small", [f"--data.shards={mias}", f"--out={out}", *short])
    losses = [line["loss"] for line in read_metrics(out / "metrics.jsonl")]
    assert losses[-1] < 0.9 * losses[0]
    assert (out / "figures" / "reconstructions.png").stat().st_size > 10_000
