"""Data sets behind URLs give what folders give, and each byte crosses the network once."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
from http_server import Server, serve

from miram.data.config import CropSection, DataSection
from miram.data.derive import derive
from miram.data.geometry import Size
from miram.data.opening import open_shards
from miram.data.phantom import PhantomSettings
from miram.data.shards import ShardDataset
from miram.data.sources.phantom import make_phantoms
from miram.data.store.local import join
from miram.data.stream import EpochStream, ViewDataset
from miram.data.verify import verify
from miram.data.views import MultiScaleViews, Normalisation
from miram.engine.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 phantoms of 10 patients as a/, and packed as b/."""
    folder = tmp_path_factory.mktemp("served")
    make_phantoms(folder / "a", 10, PhantomSettings(size=128), workers=1)
    derive(folder / "a", folder / "b", Size(), packed=True, workers=1)
    return folder


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    with serve(folder) as running:
        yield running


def views() -> MultiScaleViews:
    return MultiScaleViews((32, 16), (1, 2), 8, CropSection(), Normalisation(0.2, 0.1), seed=3)


def batches(shards: ShardDataset, rank: int, world: int, workers: int) -> list[dict[str, object]]:
    stream = EpochStream(shards, views(), 8, 0, workers)
    return list(islice(stream.batches(0, rank, world, 8 // world), stream.batches_per_epoch))


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_url_gives_what_the_folder_gives(server: Server, folder: Path, name: str) -> None:
    here, there = ShardDataset(folder / name), ShardDataset(f"{server.url}/{name}")
    assert there.digest == here.digest
    assert there.rows.column("key") == here.rows.column("key")
    for i in range(0, len(here), 7):
        np.testing.assert_array_equal(here[i].pixels[:], there[i].pixels[:])
        assert here[i].meta == there[i].meta
        assert (here[i].mask is None) == (there[i].mask is None)
    assert not list(verify(f"{server.url}/{name}"))


def test_ranks_and_workers_read_the_same_over_the_network(server: Server, folder: Path) -> None:
    here = batches(ShardDataset(folder / "a"), 0, 1, 0)
    nodes = [batches(ShardDataset(f"{server.url}/a"), rank, 2, 2) for rank in range(2)]
    for one, first, second in zip(here, *nodes, strict=True):
        assert one["key"] == [*first["key"], *second["key"]]
        assert (one["view/2"].numpy()[:4] == first["view/2"].numpy()).all()
        assert (one["view/2"].numpy()[4:] == second["view/2"].numpy()).all()


def test_an_epoch_of_four_readers_fetches_no_byte_twice(server: Server) -> None:
    """What two workers on each of two nodes ask for, without what they would fetch ahead of the next epoch."""
    shards = ShardDataset(f"{server.url}/a")
    stream = EpochStream(shards, views(), 8, 0, 0)
    readers = [pickle.loads(pickle.dumps(ViewDataset(shards, views()))) for _ in range(4)]
    server.forget()
    for t in range(stream.batches_per_epoch):
        for k, reader in enumerate(readers):
            reader.__getitems__(stream.places(t)[2 * k : 2 * k + 2])
    read = sorted((path, *place) for path, places in server.traffic.ranges.items() for place in places if place[1] > 1)
    assert all(a[0] != b[0] or a[2] <= b[1] for a, b in pairwise(read))
    assert sum(end - first for _, first, end in read) <= sum(fact["bytes"] for fact in shards.manifests[0]["shards"])
    assert len(read) <= len(shards)


def test_a_shard_that_is_gone_or_cut_is_one_sentence(server: Server, folder: Path, tmp_path: Path) -> None:
    url = f"{server.url}/a"
    shards = ShardDataset(url)
    path = folder / "a" / shards.rows[0]["shard"]
    content = path.read_bytes()
    try:
        path.write_bytes(content[:-512])
        with pytest.raises(UserError, match="miram data verify"):
            shards[0]
        path.unlink()
        with pytest.raises(UserError, match=join(url, path.name)):
            ShardDataset(url)[0]
        assert any(path.name in fault for fault in verify(url))
    finally:
        path.write_bytes(content)


def test_a_stage_opens_a_url(server: Server) -> None:
    assert len(open_shards(DataSection(shards=f"{server.url}/a", split="train"))) > 0
    with pytest.raises(UserError, match="nosuch"):
        open_shards(DataSection(shards=f"{server.url}/nosuch"))
    with pytest.raises(UserError, match="no place of data"):
        open_shards(DataSection(shards="pipe:cat /etc/passwd"))


def test_a_server_that_refuses_is_no_damage_to_be_skipped(server: Server) -> None:
    shards = ShardDataset(f"{server.url}/a")
    for name in {row["shard"] for row in shards.rows}:
        server.faults[f"/a/{name}"] = ["403"] * 99
    with pytest.raises(UserError, match="forbids"):
        next(EpochStream(shards, views(), 8, 0, 0, skip=True).batches(0, 0, 1, 8))
