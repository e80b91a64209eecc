"""Writing that is killed again and again ends as if nothing had happened, in parts as in one piece."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import broken
import pytest
from broken import archive

from miram.data.derive import OWN, derive, merge
from miram.data.geometry import Size
from miram.data.index import read_manifest
from miram.data.ingest import ingest, skipped_file
from miram.data.layout import partial_folder
from miram.data.shards import ShardDataset
from miram.data.verify import verify
from miram.data.writer import cut, identity_of
from miram.engine.errors import UserError

SECRET = b"sixteen bytes or more"


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


INGEST = """
import sys
from pathlib import Path
from broken import archive
from miram.data.ingest import ingest
if __name__ == "__main__":
    ingest(archive(), Path(sys.argv[1]), b"sixteen bytes or more", workers=int(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "set"
    ingest(archive(), out, SECRET, workers=1)
    return out


@pytest.mark.parametrize(("kills", "workers"), [(6, 1), pytest.param(20, 2, marks=pytest.mark.slow)])
def test_kills_at_random_moments_leave_no_trace(undisturbed: Path, tmp_path: Path, kills: int, workers: int) -> None:
    out, script, rng = tmp_path / "set", tmp_path / "ingest.py", random.Random(0)
    script.write_text(INGEST)
    command = [sys.executable, str(script), str(out), str(workers)]
    environment = os.environ | {"PYTHONPATH": str(Path(broken.__file__).parent)}
    struck, seen = 0, set()
    while struck < kills:
        before = finished_shards(out)
        process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL, env=environment)
        # Every other kill strikes within the start, the rest shortly after another shard was finished.
        patience = time.monotonic() + (rng.uniform(0.2, 2.0) if struck % 2 else 60)
        while process.poll() is None and finished_shards(out) == before and time.monotonic() < patience:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.1))
        os.killpg(process.pid, signal.SIGKILL)
        struck += process.wait() == -signal.SIGKILL
        seen.add(finished_shards(out))
        if out.exists():
            break
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL, env=environment)
    assert struck >= 3
    assert len(seen) > 2, "kills came before or after the work, none within"
    assert content(out) == content(undisturbed)
    assert skipped_file(out).read_bytes() == skipped_file(undisturbed).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ingest.py", "set", "set.skipped.csv"]


def finished_shards(out: Path) -> int:
    return len(list(partial_folder(out).glob("shard-*.json")))


def test_what_was_finished_is_not_done_again(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import miram.data.ingest as module

    done: list[str] = []
    real = module.prepare

    def counted(record: object, **options: object) -> object:
        if len(done) == 30:
            raise KeyboardInterrupt
        done.append(record.name)  # type: ignore[attr-defined]
        return real(record, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "prepare", counted)
    with pytest.raises(KeyboardInterrupt):
        ingest(archive(), tmp_path / "set", SECRET, workers=1)
    again = len(done)
    done.clear()
    done.extend(["-"] * 31)
    ingest(archive(), tmp_path / "set", SECRET, workers=1)
    assert len(done) - 31 == len(archive().records) - again // 8 * 8
    assert content(tmp_path / "set") == content(undisturbed)


def test_finished_shards_of_another_plan_are_not_thrown_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import miram.data.ingest as module

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "publish", stop)
    with pytest.raises(KeyboardInterrupt):
        ingest(archive(), tmp_path / "set", SECRET, workers=1)
    monkeypatch.undo()
    with pytest.raises(UserError, match="finished shards of an interrupted run"):
        ingest(archive(), tmp_path / "set", SECRET, workers=1, size=Size(max_size=40))
    ingest(archive(), tmp_path / "set", SECRET, workers=1)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["set"]


def test_a_kill_between_the_name_and_the_sweeping_is_survived(undisturbed: Path, tmp_path: Path) -> None:
    ingest(archive(), tmp_path / "set", SECRET, workers=1)
    shutil.rmtree(tmp_path / "set")
    partial = partial_folder(tmp_path / "set")
    partial.mkdir()
    facts = {k: v for k, v in read_manifest(undisturbed).items() if k not in OWN}
    shards = {str(k): len(items) for k, items in cut(archive().records).items()}
    plan = {"schema": "miram.plan/1", "identity": identity_of(json.dumps(facts)), "shards": shards}
    (partial / "plan.json").write_text(json.dumps(plan))
    ingest(archive(), tmp_path / "set", SECRET, workers=1)
    assert content(tmp_path / "set") == content(undisturbed)


def test_what_an_option_changes_makes_another_set(tmp_path: Path) -> None:
    ingest(archive(), tmp_path / "set", SECRET, workers=1)
    with pytest.raises(UserError, match="of the same images; it differs in preprocessing"):
        ingest(replace(archive(), quarantine=True), tmp_path / "set", SECRET, workers=1)


def test_a_link_to_an_empty_folder_is_written_where_it_leads(undisturbed: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "set").symlink_to(tmp_path / "elsewhere")
    ingest(archive(), tmp_path / "set", SECRET, workers=1)
    assert content(tmp_path / "elsewhere") == content(undisturbed)


def test_two_at_once_are_kept_apart(tmp_path: Path) -> None:
    from miram.data.writer import locked

    with locked(tmp_path / "set"), pytest.raises(UserError, match="another process"):
        ingest(archive(), tmp_path / "set", SECRET, workers=1)


def test_an_index_that_was_edited_is_refused(undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, tmp_path / "set")
    text = (tmp_path / "set" / "index.csv").read_text()
    (tmp_path / "set" / "index.csv").write_text(text.replace("train", "test"))
    with pytest.raises(UserError, match="was changed after it was written"):
        ShardDataset(tmp_path / "set")


@pytest.mark.parametrize("count", [1, 3, 20])
def test_parts_join_to_the_bytes_of_the_whole(undisturbed: Path, tmp_path: Path, count: int) -> None:
    parts = [tmp_path / f"part-{i}" for i in range(count)]
    for i, part in enumerate(parts, start=1):
        ingest(archive(), part, SECRET, workers=1, part=(i, count))
        assert not list(verify(part))
    merge(parts[::-1], tmp_path / "set")
    assert content(tmp_path / "set") == content(undisturbed)
    assert skipped_file(tmp_path / "set").read_bytes() == skipped_file(undisturbed).read_bytes()


def test_parts_that_do_not_fit_are_refused_by_name(undisturbed: Path, tmp_path: Path) -> None:
    for i in (1, 2):
        ingest(archive(), tmp_path / f"{i}", SECRET, workers=1, part=(i, 3))
    ingest(archive(4), tmp_path / "other", SECRET, workers=1, part=(3, 3))
    for parts, match in (
        (["1", "2"], "missing: 3"),
        (["1", "2", "other"], "other was not made with the same"),
        (["1", "1", "2"], "missing: 3"),
    ):
        with pytest.raises(UserError, match=match):
            merge([tmp_path / part for part in parts], tmp_path / "set")
    with pytest.raises(UserError, match="no part"):
        merge([undisturbed], tmp_path / "set")
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(("count", "shards"), [(1, 1), (8, 1), (9, 2), (800, 67), (54706, 855)])
def test_shards_are_few_for_few_and_never_large(count: int, shards: int) -> None:
    made = cut(range(count))
    assert len(made) == shards
    assert [i for items in made.values() for i in items] == list(range(count))


def test_a_packed_set_holds_the_same_samples(undisturbed: Path, tmp_path: Path) -> None:
    derive(undisturbed, tmp_path / "packed", Size(), packed=True, workers=1)
    first, packed = ShardDataset(undisturbed), ShardDataset(tmp_path / "packed")
    assert not list(verify(tmp_path / "packed"))
    assert read_manifest(tmp_path / "packed")["records"] == read_manifest(undisturbed)["records"]
    assert first.rows.column("key") == packed.rows.column("key")
    for i in range(len(first)):
        assert (first[i].pixels == packed[i].pixels[:]).all()
        assert ((first[i].mask is None) and packed[i].mask is None) or (first[i].mask == packed[i].mask).all()
        assert first[i].meta == packed[i].meta


def test_a_smaller_set_keeps_marks_on_their_findings_and_the_way_back(undisturbed: Path, tmp_path: Path) -> None:
    derive(undisturbed, tmp_path / "small", Size(max_size=40), packed=False, workers=1)
    first, small = ShardDataset(undisturbed), ShardDataset(tmp_path / "small")
    found = 0
    for i in range(len(first)):
        one, other = first[i], small[i]
        factor = one.pixels.shape[0] / other.pixels.shape[0]
        assert max(other.pixels.shape) == 40
        assert float(small.rows[i]["spacing_mm"]) == pytest.approx(
            float(first.rows[i]["spacing_mm"]) * factor, rel=1e-4
        )
        for a, b in zip(one.meta["circles"], other.meta["circles"], strict=True):
            assert (b["x"] + 0.5) * one.pixels.shape[1] / other.pixels.shape[1] == pytest.approx(a["x"] + 0.5)
            found += 1
        assert other.meta["geometry"] | {"rows": 0, "columns": 0} == one.meta["geometry"] | {"rows": 0, "columns": 0}
    assert found > 10


def test_packed_samples_are_not_kept(undisturbed: Path, tmp_path: Path) -> None:
    """They hold no pixels, so a limit in bytes would never drop one."""
    derive(undisturbed, tmp_path / "packed", Size(), packed=True, workers=1)
    shards = ShardDataset(tmp_path / "packed", cache_mb=1)
    assert shards[0] is not shards[0]
