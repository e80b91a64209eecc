"""Bytes of shards: the same from a folder, a web server and an object store, each once, and honest when they fail."""

from __future__ import annotations

import importlib.util
import io
import multiprocessing
import random
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
from http_server import Server, serve

from miram.data.store import local as store
from miram.data.store import remote
from miram.data.store.local import (
    CutShort,
    LocalStore,
    Missing,
    Place,
    RemoteStore,
    Store,
    Unreachable,
    around,
    check_scheme,
    display,
    is_remote,
    join,
    merge,
    open_store,
    read_text,
    span,
)
from miram.engine.errors import UserError

CONTENT = random.Random(0).randbytes(400_000)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "a.tar").write_bytes(CONTENT)
    (tmp_path / "b.tar").write_bytes(CONTENT[::-1])
    (tmp_path / "empty.tar").write_bytes(b"")
    with serve(tmp_path) as server:
        yield server


# ---------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    "url", ["/a/b", "./a:b", "a/b", "file:///a", "http://h/x", "HTTPS://h:8/x", "s3://b/x", "gs://b/x"]
)
def test_paths_and_a_few_schemes_are_places(url: str) -> None:
    check_scheme(url)


@pytest.mark.parametrize(
    "url",
    [
        "pipe:touch pwned",
        "PIPE:touch pwned",
        "ftp://h/x",
        "simplecache::http://h/x",
        "http://h/x::s3://b/y",
        "s3://bucket/${HOME}",
        "http://h/$(id)",
        "http:///x",
        "http://[h/x",
        "https://h/a b",
        "https://h/a\n",
        "file://other/x",
        "hf://datasets/x",
        "memory://x",
        "local:///etc/passwd",
        "github://x:y@/z",
        "gopen:x",
    ],
)
def test_any_other_scheme_is_refused(url: str) -> None:
    for use in (check_scheme, lambda u: join("/data", u), lambda u: open_store(u, 1), lambda u: read_text(u, "x")):
        with pytest.raises(UserError):
            use(url)


def test_names_are_joined_to_paths_and_urls() -> None:
    assert join("/d", "x.tar") == "/d/x.tar"
    assert join("file:///d%20e", "x.tar") == "/d e/x.tar"
    assert join("/d", "/e/x.tar") == "/e/x.tar"
    assert join("http://h/d/", "x.tar") == "http://h/d/x.tar"
    assert join("http://h/d?sig=1", "100% a#?.tar") == "http://h/d/100%25%20a%23%3F.tar?sig=1"
    assert join("s3://b", "x.tar") == "s3://b/x.tar"
    assert join("/d", "http://h/x.tar") == join("s3://b", "http://h/x.tar") == "http://h/x.tar"
    assert [is_remote(x) for x in ("/d", "file:///d", "HTTP://h/x", "s3://b")] == [False, False, True, True]


@pytest.mark.parametrize(
    ("root", "name"), [("http://h/d", "/etc/x"), ("s3://b/d", "file:///x"), ("/d", "../x"), ("http://h/d", "a/../../x")]
)
def test_an_index_cannot_lead_out_of_its_data_set(root: str, name: str) -> None:
    with pytest.raises(UserError, match="outside"):
        join(root, name)


def test_secrets_of_a_url_are_not_shown(site: Server) -> None:
    url = site.url.replace("//", "//ann:secret@") + "/none.tar?signature=secret"
    assert display(url) == f"{site.url}/none.tar"
    with pytest.raises(UserError) as caught:
        RemoteStore(1).read(url, 0, 9)
    assert "secret" not in str(caught.value)
    assert "none.tar" in str(caught.value)


def test_near_places_are_merged_as_a_brute_force_does() -> None:
    rng = random.Random(1)
    for _ in range(200):
        places = [(rng.choice("ab"), rng.randrange(60), rng.randrange(1, 9)) for _ in range(rng.randrange(1, 12))]
        gap = rng.randrange(5)
        covered: set[tuple[str, int]] = set()
        for shard in "ab":
            bytes_of = {i for s, offset, size in places if s == shard for i in range(offset, offset + size)}
            for i in sorted(bytes_of):
                after = min((j for j in bytes_of if j > i), default=i)
                covered |= {(shard, j) for j in ([i, *range(i, after)] if after - i - 1 <= gap else [i])}
        merged = merge(places, gap)
        assert {(shard, i) for shard, offset, size in merged for i in range(offset, offset + size)} == covered
        assert sum(size for *_, size in merged) == len(covered)


def test_merging_does_not_make_places_too_long() -> None:
    places = [("a", i * 100, 100) for i in range(10)]
    assert merge(places, limit=250) == [("a", i * 200, 200) for i in range(5)]
    assert merge([("a", 0, 900), ("a", 100, 50)], limit=250) == [("a", 0, 900)]
    assert span(places) == ("a", 0, 1000)


@pytest.mark.parametrize("places", [[("a", 0, 1), ("b", 1, 1)], [("a", 0, 1), ("a", 5000, 1)]])
def test_members_that_are_far_apart_have_no_span(places: list[Place]) -> None:
    with pytest.raises(UserError, match="together"):
        span(places)


def test_the_run_around_a_member_leaves_out_what_is_far() -> None:
    members = [("a", 0, 100), ("a", 600, 5000), ("a", 90_000, 10), ("b", 500, 10)]
    assert [around(place, members) for place in members] == [("a", 0, 5600)] * 2 + members[2:]


# ---------------------------------------------------------------------------------------------- reading


def stores(site: Server) -> list[tuple[Store, str]]:
    return [(open_store(str(site.folder), 1), str(site.folder)), (open_store(site.url, 1), site.url)]


def test_every_store_reads_the_same_bytes(site: Server) -> None:
    rng = random.Random(2)
    for reader, root in stores(site):
        for _ in range(20):
            start = rng.randrange(len(CONTENT))
            size = rng.randrange(min(9000, len(CONTENT) - start))
            if rng.random() < 0.3:
                reader.prefetch(
                    [(join(root, "a.tar"), start + i * 50, 70) for i in range(9) if start + i * 50 + 70 < len(CONTENT)]
                )
            assert reader.read(join(root, "a.tar"), start, size) == CONTENT[start : start + size]
            assert reader.read(join(root, "b.tar"), start, size) == CONTENT[::-1][start : start + size]
        assert reader.size(join(root, "a.tar")) == len(CONTENT)
        assert read_text(root, "a.tar") == CONTENT
        reader.close()
        assert reader.read(join(root, "a.tar"), 5, 10) == CONTENT[5:15]


def test_what_is_missing_is_told_from_what_is_short(site: Server) -> None:
    for reader, root in stores(site):
        for use in (partial(reader.read, offset=0, size=10), reader.size, lambda name: read_text(name, "")):
            with pytest.raises(Missing, match=re.escape(f"{root}/none.tar")):
                use(f"{root}/none.tar")
        for place in ((len(CONTENT) - 5, 10), (len(CONTENT) + 5, 10), (0, len(CONTENT) + 1), (0, 2**60)):
            with pytest.raises(CutShort, match=re.escape(f"{root}/a.tar")):
                reader.read(f"{root}/a.tar", *place)
        with pytest.raises(CutShort):
            reader.read(f"{root}/empty.tar", 0, 1)


def test_a_text_too_large_to_be_one_is_not_read(site: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "TEXT_LIMIT", len(CONTENT) - 1)
    for root in (site.url, str(site.folder)):
        site.forget()
        with pytest.raises(UserError, match="too many"):
            read_text(root, "a.tar")
        assert site.traffic.sent["/a.tar"] <= 1


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_few_local_files_stay_open(tmp_path: Path) -> None:
    for i in range(store.OPEN_SHARDS + 5):
        (tmp_path / f"{i}.tar").write_bytes(bytes([i]) * 9)
    reader, before = LocalStore(), open_files()
    for _ in range(2):
        for i in range(store.OPEN_SHARDS + 5):
            assert reader.read(f"{tmp_path}/{i}.tar", 3, 4) == bytes([i]) * 4
    assert open_files() == before + store.OPEN_SHARDS
    reader.close()
    assert open_files() == before


@pytest.mark.parametrize("kind", ["folder", "forbidden", "zero byte"])
def test_local_files_that_cannot_be_read_are_named(tmp_path: Path, kind: str) -> None:
    path = {"folder": str(tmp_path), "forbidden": str(tmp_path / "x"), "zero byte": "a\0b"}[kind]
    if kind == "forbidden":
        (tmp_path / "x").symlink_to("x")  # a loop: refused whoever asks
    with pytest.raises(UserError, match="cannot be"):
        LocalStore().read(path, 0, 1)


# ---------------------------------------------------------------------------------------------- traffic


def test_a_member_is_fetched_once_while_it_is_kept(site: Server) -> None:
    reader = RemoteStore(1)
    for _ in range(3):
        reader.read(f"{site.url}/a.tar", 1000, 5000)
        reader.read(f"{site.url}/a.tar", 1200, 300)
    assert site.traffic.ranges == {"/a.tar": [(1000, 6000)]}


def test_the_cache_keeps_what_was_used_last_and_stays_below_its_limit(site: Server) -> None:
    reader, shard = RemoteStore(1), f"{site.url}/a.tar"
    cache = reader._cache
    cache.limit = 10_000
    for start in (0, 10_000, 20_000):
        reader.read(shard, start, 3000)
    reader.read(shard, 0, 3000)
    reader.read(shard, 30_000, 3000)  # the second one goes
    assert cache.bytes == 9000
    assert [cache.find((shard, start, 3000)) is not None for start in (0, 10_000, 20_000, 30_000)] == [
        True,
        False,
        True,
        True,
    ]


def test_a_batch_larger_than_the_cache_is_still_fetched_once(site: Server) -> None:
    reader, shard = RemoteStore(0), f"{site.url}/a.tar"
    batch = [(shard, start, 5000) for start in range(0, 200_000, 20_000)]
    reader.prefetch(batch)
    reader.read(shard, 300_000, 100)  # nobody told of this one
    for place in batch:
        assert reader.read(*place) == CONTENT[place[1] : place[1] + 5000]
    assert sorted(site.traffic.ranges["/a.tar"]) == [*((p[1], p[1] + 5000) for p in batch), (300_000, 300_100)]
    reader.prefetch([(shard, 380_000, 10)])
    assert reader._cache.bytes == 10


def test_what_is_at_hand_is_not_fetched_again_by_a_prefetch(site: Server) -> None:
    reader, shard = RemoteStore(0), f"{site.url}/a.tar"
    reader.prefetch([(shard, 0, 1000), (shard, 50_000, 1000)])
    site.forget()
    reader.prefetch([(shard, 100, 100), (shard, 50_500, 500), (shard, 90_000, 7)])
    assert site.traffic.ranges["/a.tar"] == [(90_000, 90_007)]
    assert reader.read(shard, 50_900, 100) == CONTENT[50_900:51_000]
    assert site.traffic.requests["/a.tar"] == 1


def test_requests_of_a_batch_overlap(site: Server) -> None:
    site.delay = 0.15
    reader, places = RemoteStore(1), [(f"{site.url}/a.tar", start, 1000) for start in range(0, 120_000, 10_000)]
    reader.read(f"{site.url}/b.tar", 0, 1)  # the first one pays for imports
    started = time.monotonic()
    reader.prefetch(places)
    assert time.monotonic() - started < 0.5 * 0.15 * len(places)
    assert site.traffic.most_in_flight > 4


def tar_of(count: int) -> tuple[bytes, list[list[tuple[int, int]]]]:
    """A tar, and (offset, size) of the JSON, the image (of a few hundred kB) and the mask of each sample."""
    rng, buffer = random.Random(3), io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for i in range(count):
            for kind, size in (("json", 300), ("png", rng.randrange(100_000, 400_000)), ("mask.png", 900)):
                member = tarfile.TarInfo(f"{i:03d}.{kind}")
                member.size = size
                tar.addfile(member, io.BytesIO(rng.randbytes(size)))
    with tarfile.open(fileobj=io.BytesIO(buffer.getvalue())) as tar:
        places = [(member.offset_data, member.size) for member in tar]
    return buffer.getvalue(), [places[i : i + 3] for i in range(0, len(places), 3)]


def read_share(url: str, batches: list[list[list[tuple[int, int]]]], content: bytes) -> None:
    """A loader's worker: its batches, each prefetched, then member by member."""
    reader = open_store(url, 1)
    for batch in batches:
        reader.prefetch([span((f"{url}/big.tar", *member) for member in sample) for sample in batch])
        for offset, size in (member for sample in batch for member in sample):
            assert reader.read(f"{url}/big.tar", offset, size) == content[offset : offset + size]


def test_an_epoch_over_two_nodes_with_two_workers_costs_its_bytes_once(site: Server) -> None:
    content, samples = tar_of(64)
    total = sum(size for sample in samples for _, size in sample)
    (site.folder / "big.tar").write_bytes(content)
    random.Random(5).shuffle(samples)
    batches = [samples[i : i + 4] for i in range(0, len(samples), 4)]
    open_store(site.url, 1).read(f"{site.url}/a.tar", 0, 1)  # the parent has a loop and connections, as a trainer has
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=read_share, args=(site.url, batches[worker::4], content)) for worker in range(4)]
    for process in workers:
        process.start()
    for process in workers:
        process.join(60)
        assert process.exitcode == 0
    assert total <= site.traffic.sent["/big.tar"] <= 1.02 * total
    asked = sorted(site.traffic.ranges["/big.tar"])
    assert all(a[1] <= b[0] for a, b in pairwise(asked))
    assert len(asked) <= len(samples)


# ---------------------------------------------------------------------------------------------- processes


def check_read(reader: Store, url: str) -> None:
    assert reader.read(f"{url}/a.tar", 70_000, 500) == CONTENT[70_000:70_500]
    reader.prefetch([(f"{url}/b.tar", 0, 9), (f"{url}/b.tar", 90_000, 9)])
    assert reader.read(f"{url}/b.tar", 90_000, 9) == CONTENT[::-1][90_000:90_009]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_store_in_use_goes_on_in_other_processes(site: Server, method: str) -> None:
    for reader, root in stores(site):
        reader.read(f"{root}/a.tar", 0, 100)
        process = multiprocessing.get_context(method).Process(target=check_read, args=(reader, root))
        process.start()
        process.join(60)
        assert process.exitcode == 0
        check_read(reader, root)


# ---------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("fault", ["500", "503", "429", "drop", "short"])
def test_a_passing_fault_is_outlived(site: Server, fault: str) -> None:
    site.faults["/a.tar"] = [fault]
    assert RemoteStore(1).read(f"{site.url}/a.tar", 1000, 20_000) == CONTENT[1000:21_000]
    assert site.traffic.requests["/a.tar"] == 2


@pytest.mark.parametrize("fault", ["500", "drop", "short"])
def test_a_lasting_fault_is_told_after_a_few_attempts(site: Server, fault: str) -> None:
    site.faults["/a.tar"] = [fault] * 99
    for use in (lambda r, p: r.read(*p), lambda r, p: r.prefetch([p])):
        site.forget()
        with pytest.raises(Unreachable, match="/a"):
            use(RemoteStore(1), (f"{site.url}/a.tar", 1000, 20_000))
        assert site.traffic.requests["/a.tar"] == remote.ATTEMPTS


@pytest.mark.parametrize("fault", ["403", "401", "400", "shift"])
def test_a_final_answer_is_not_asked_for_again(site: Server, fault: str) -> None:
    site.faults["/a.tar"] = [fault] * 9
    with pytest.raises(UserError, match="/a"):
        RemoteStore(1).read(f"{site.url}/a.tar", 1000, 20_000)
    assert site.traffic.requests["/a.tar"] == 1


def test_no_server_is_told_as_such() -> None:
    with pytest.raises(Unreachable, match="check the network"):
        RemoteStore(1).read("http://127.0.0.1:9/a.tar", 0, 1)


def test_a_server_that_hangs_is_given_up(site: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "TIMEOUTS", {"sock_read": 0.1})
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    site.delay = 1.0
    started = time.monotonic()
    with pytest.raises(Unreachable):
        RemoteStore(1).read(f"{site.url}/a.tar", 0, 10)
    assert time.monotonic() - started < 1.0


def test_one_bad_place_of_a_batch_does_not_cost_the_others(site: Server) -> None:
    reader = RemoteStore(1)
    good = [(f"{site.url}/a.tar", start, 100) for start in (0, 50_000)]
    reader.prefetch([*good, (f"{site.url}/none.tar", 0, 100), (f"{site.url}/b.tar", len(CONTENT), 100)])
    site.forget()
    assert [reader.read(*place) for place in good] == [CONTENT[:100], CONTENT[50_000:50_100]]
    assert not site.traffic.requests
    with pytest.raises(Missing):
        reader.read(f"{site.url}/none.tar", 0, 100)


def test_a_server_without_ranges_is_refused_before_it_sends_a_shard(site: Server) -> None:
    with (site.folder / "large.tar").open("wb") as file:
        file.truncate(64 * 2**20)
    site.ranges = False
    reader, url = RemoteStore(1), f"{site.url}/large.tar"
    for use in (lambda: reader.read(url, 1000, 10), lambda: reader.size(url), lambda: reader.read(url, 0, 10)):
        with pytest.raises(UserError, match="ignores ranges"):
            use()
    assert site.traffic.requests["/large.tar"] == 3
    assert site.traffic.sent["/large.tar"] < 3 * 8 * 2**20  # what lies in buffers, of 64 MB each
    assert reader.read(f"{site.url}/a.tar", 0, len(CONTENT)) == CONTENT  # all of it was asked for


def test_redirects_are_followed(site: Server) -> None:
    site.redirects["/moved.tar"] = f"{site.url}/a.tar"
    assert RemoteStore(1).read(f"{site.url}/moved.tar", 10, 20) == CONTENT[10:30]
    assert RemoteStore(1).size(f"{site.url}/moved.tar") == len(CONTENT)


def test_the_store_starts_without_network_libraries() -> None:
    code = "import sys, miram.data.store.local; sys.exit(any(m in sys.modules for m in ('fsspec', 'aiohttp', 'torch')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ---------------------------------------------------------------------------------------------- object stores


@pytest.mark.skipif(importlib.util.find_spec("s3fs") is not None, reason="s3fs is installed")
def test_a_missing_package_is_named() -> None:
    with pytest.raises(UserError, match=re.escape("pip install 'miram[s3]'")):
        RemoteStore(1).read("s3://bucket/a.tar", 0, 1)


@pytest.fixture
def bucket(site: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    pytest.importorskip("s3fs")
    (site.folder / "bucket").mkdir()
    (site.folder / "bucket" / "a.tar").write_bytes(CONTENT)
    monkeypatch.setenv("AWS_ENDPOINT_URL", site.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return "s3://bucket"


def test_an_object_store_is_read_by_ranges(site: Server, bucket: str) -> None:
    reader = open_store(bucket, 1)
    reader.prefetch([(f"{bucket}/a.tar", start, 100) for start in range(0, 90_000, 10_000)])
    assert reader.read(f"{bucket}/a.tar", 20_010, 90) == CONTENT[20_010:20_100]
    assert sorted(site.traffic.ranges["/bucket/a.tar"]) == [(s, s + 100) for s in range(0, 90_000, 10_000)]
    assert reader.size(f"{bucket}/a.tar") == len(CONTENT)
    assert read_text(bucket, "a.tar") == CONTENT
    process = multiprocessing.get_context("fork").Process(target=reader.read, args=(f"{bucket}/a.tar", 7, 9))
    process.start()
    process.join(30)
    assert process.exitcode == 0


def test_faults_of_an_object_store_are_told_apart(site: Server, bucket: str) -> None:
    reader = open_store(bucket, 1)
    for use in (lambda: reader.read(f"{bucket}/none.tar", 0, 9), lambda: reader.size(f"{bucket}/none.tar")):
        with pytest.raises(Missing):
            use()
    for start in (len(CONTENT) - 5, len(CONTENT) + 5):
        with pytest.raises(CutShort):
            reader.read(f"{bucket}/a.tar", start, 10)
    site.faults["/bucket/a.tar"] = ["500", "drop"]
    assert reader.read(f"{bucket}/a.tar", 0, 5000) == CONTENT[:5000]
    site.ranges = False
    with pytest.raises(UserError, match="ignores ranges"):
        reader.read(f"{bucket}/a.tar", 9000, 10)
