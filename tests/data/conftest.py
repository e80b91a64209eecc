"""Small data sets that the tests of the data package share."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from miram.data.image import encode_png
from miram.data.layout import Encoded, Moments, finished, seal, write_tar
from miram.data.phantom import PhantomSettings
from miram.data.record import Film, Pixels
from miram.data.sources.phantom import make_phantoms

Build = Callable[..., Path]


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve phantoms in one shard. Read only: `copied` is for damage."""
    folder = tmp_path_factory.mktemp("phantoms") / "set"
    make_phantoms(folder, 3, PhantomSettings(size=96), workers=1)
    return folder


@pytest.fixture
def copied(phantoms: Path, tmp_path: Path) -> Path:
    """The phantoms, free to be damaged."""
    return Path(shutil.copytree(phantoms, tmp_path / "copied"))


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Writes arrays as a data set with as many samples a shard as asked."""

    def make(
        images: Sequence[Pixels],
        *,
        name: str = "built",
        per_shard: int = 1000,
        splits: Sequence[str] = (),
        labels: Sequence[dict[str, str]] = (),
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        shards = []
        for start in range(0, len(images), per_shard):
            path = folder / f"shard-{start // per_shard:06d}.tar"
            numbers = range(start, min(start + per_shard, len(images)))
            rows, moments = write_tar(path, [encoded(name, i, images[i], splits, labels) for i in numbers])
            shards.append(finished(path, rows, moments))
        seal(folder, shards, {"dataset": name, "licence": "none", "records": name})
        return folder

    return make


def encoded(name: str, i: int, image: Pixels, splits: Sequence[str], labels: Sequence[dict[str, str]]) -> Encoded:
    row = {
        "dataset": name,
        "split": splits[i] if splits else "",
        "max_value": np.iinfo(image.dtype).max,
        **({f"label_{task}": label for task, label in labels[i].items()} if labels else {}),
    }
    key = f"{re.sub('[^0-9a-z_-]', '-', name)}-{i:04d}"
    members = {"png": encode_png(image), "json": json.dumps({"i": i}).encode()}
    moments = Moments.of(Film(pixels=image, max_value=int(np.iinfo(image.dtype).max)))
    return Encoded(key, row, members, moments)


@pytest.fixture(scope="session")
def breast_film() -> Film:
    """12 bits: half an ellipse on the left, black beside it."""
    y, x = np.mgrid[:120, :100]
    radius = np.hypot((y - 60) / 50, x / 70)
    light = np.where(radius < 1, 700 + 3000 * np.sqrt(np.clip(1 - radius, 0, 1)), 0)
    return Film(pixels=light.astype(np.uint16), max_value=4095)
