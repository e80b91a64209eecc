"""The data commands as a lab would type them: DICOM in, parts, merge, split, pack, train, probe, audit."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from dicoms import write_dicom

from miram.data.phantom import PhantomSettings, records
from miram.data.shards import ShardDataset

Say = Callable[..., tuple[int, str, str]]
TINY = [
    "--model.encoder_options={depth: 1, embed_dim: 32, num_heads: 2}",
    "--model.image_size=32",
    "--model.scales=[{scale: 1, depth: 1, width: 32, heads: 2}]",
    "--train.batch_size=8",
    "--train.steps=2",
    "--data.workers=0",
]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 phantoms of 12 patients as DICOM, with names, and a table of densities."""
    folder = tmp_path_factory.mktemp("hospital")
    lines = ["file,density"]
    for i, record in enumerate(records(12, PhantomSettings(size=128, seed=3))):
        write_dicom(
            folder / f"image{i}.dcm",
            record.read().pixels,
            BitsStored=12,
            PatientID=f"MRN-{1000 + i // 4}",
            PatientName=f"Doe^Jane {i // 4}",
            ImageLaterality=record.laterality,
            ViewPosition=record.view,
        )
        lines.append(f"image{i}.dcm,{'ab'[i // 4 % 2]}")
    (folder / "labels.csv").write_text("\n".join(lines))
    return folder


def test_from_dicom_in_parts_to_a_trained_encoder_that_names_nobody(
    archive: Path, tmp_path: Path, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)
    ingest = [
        "data",
        "ingest",
        "folder",
        archive,
        "--labels",
        archive / "labels.csv",
        "--name",
        "clinic",
        "--workers",
        1,
    ]
    for i in (1, 2, 3):
        assert say(*ingest, f"part{i}", "--partition", f"{i}/3")[0] == 0
    assert say("data", "merge", "part1", "part2", "part3", "joined")[0] == 0
    assert say(*ingest, "whole")[0] == 0
    for path in Path("whole").iterdir():
        assert path.read_bytes() == (Path("joined") / path.name).read_bytes()
    shards = ShardDataset("whole")
    assert len(shards) == 48
    assert len(set(shards.rows.column("patient"))) == 12

    assert say("data", "pack", "whole", "packed", "--max-size", 96)[0] == 0
    assert say("data", "verify", "packed", "--samples")[0] == 0
    code, out, _ = say("data", "split", "packed", "--task", "density", "--folds", 2, "--out", "split.json")
    assert code == 0
    assert "fold 1" in out
    given = ["--data.shards=packed", "--data.split_file=split.json", *TINY]
    assert say("pretrain", "pretrain/demo", "--out", "run", *given)[0] == 0
    assert say("pretrain", "pretrain/demo", "--out", "fold", *given, "--data.fold=0")[0] == 0
    probe = ["probe", "probe/demo", "--data.shards=packed", "--data.split_file=split.json", "--data.split=null"]
    probe += ["--data.task=density", "--probe.encoder=run", "--probe.folds=2", "--probe.controls=1", "--out", "probed"]
    code, out, err = say(*probe)
    assert (code, err) == (0, "") or code == 0, err
    result = json.loads(Path("probed/result.json").read_text())
    test = set(json.loads(Path("split.json").read_text())["splits"]["test"])
    assert result["n_patients"] == len(test)

    for made in ("whole", "packed", "run", "probed"):
        code, out, err = say("data", "audit", made, "--source", archive)
        assert (code, err) == (0, ""), made
    assert "no near-duplicates" in say("data", "duplicates", "whole")[1]


def test_a_split_of_other_data_is_refused(archive: Path, tmp_path: Path, say: Say) -> None:
    for seed in (0, 1):
        say("data", "phantom", tmp_path / f"{seed}", "--patients", 4, "--size", 64, "--seed", seed)
    split = tmp_path / "split.json"
    assert say("data", "split", tmp_path / "0", "--out", split)[0] == 0
    arguments = ["--data.shards", tmp_path / "1", f"--data.split_file={split}", "--out", tmp_path / "run", *TINY]
    code, _, err = say("pretrain", "pretrain/demo", f"--data.shards={tmp_path / '1'}", *arguments[2:])
    assert code == 2
    assert "other data" in err
    assert not (tmp_path / "run").exists()


def test_a_patient_on_both_sides_is_refused_by_every_stage(archive: Path, tmp_path: Path, say: Say) -> None:
    lines = ["file,patient,split,density"]
    lines += [f"image{i}.dcm,P{i // 4},{'train' if i % 3 else 'test'},{'ab'[i // 4 % 2]}" for i in range(48)]
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    key = tmp_path / "key"
    key.write_text("a secret of sixteen bytes or more")
    ingest = ["data", "ingest", "folder", archive, tmp_path / "set", "--labels", tmp_path / "labels.csv", "--key", key]
    assert say(*ingest)[0] == 0
    given = [f"--data.shards={tmp_path / 'set'}"]
    for command in (
        ["pretrain", "pretrain/demo", *TINY],
        [
            "probe",
            "probe/demo",
            "--data.split=train",
            "--probe.encoder=timm:vit_tiny_patch16_224",
            "--data.task=density",
        ],
        [
            "probe",
            "probe/demo",
            "--data.split=null",
            "--probe.encoder=timm:vit_tiny_patch16_224",
            "--data.task=density",
        ],
    ):
        code, _, err = say(*command, *given, "--out", tmp_path / "run")
        assert code == 2
        assert "12 patients" in err, err
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["ingest", "cbis", "{src}", "{out}"], "cbis-ddsm"),
        (["ingest", "folder", "{src}x", "{out}"], "is not there"),
        (["ingest", "folder", "{src}", "{out}", "--level", "roi"], "--level"),
        (["ingest", "folder", "{src}", "{out}", "--partition", "0/3"], "--partition"),
        (["ingest", "folder", "{src}", "{out}", "--channels", "2"], "--channels"),
        (["resize", "{src}", "{out}"], "--max-size"),
        (["merge", "{src}", "{out}"], "manifest.json"),
        (["index", "{src}", "{out}"], "tar"),
        (["split", "{src}"], "manifest.json"),
        (["audit", "{src}x"], "is not there"),
        (["verify", "ftp://host/set"], "no place of data"),
        pytest.param(["verify", "http://127.0.0.1:9/set"], "127.0.0.1:9", marks=pytest.mark.slow),  # it tries again
    ],
)
def test_what_is_wrong_is_one_sentence(
    arguments: list[str], named: str, archive: Path, tmp_path: Path, say: Say
) -> None:
    places = {"src": archive, "out": tmp_path / "out"}
    code, _, err = say("data", *(a.format(**places) for a in arguments))
    assert code == 2
    assert named in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_every_grey_level_survives_from_dicom_to_batch(tmp_path: Path, say: Say) -> None:
    """A 16-bit ramp of all 65,536 codes: error below one code in the fractions that a batch holds."""
    from miram.data.config import CropSection
    from miram.data.stream import EpochStream
    from miram.data.views import MultiScaleViews, Normalisation

    (tmp_path / "src").mkdir()
    ramp = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    write_dicom(tmp_path / "src" / "ramp.dcm", ramp, BitsStored=16)
    key = tmp_path / "key"
    key.write_text("a secret of sixteen bytes or more")
    say("data", "ingest", "folder", tmp_path / "src", tmp_path / "set", "--no-breast", "--key", key)
    say("data", "pack", tmp_path / "set", tmp_path / "packed")
    crop = CropSection(area=(1, 1), aspect=(1, 1), flip=False)
    views = MultiScaleViews((128, 128), (1, 2), 64, crop, Normalisation(0.0, 1.0), seed=0)
    for name in ("set", "packed"):
        stream = EpochStream(ShardDataset(tmp_path / name), views, 1, 0, 0)
        (view,) = next(stream.batches(0, 0, 1, 1))["view/2"].numpy()
        assert np.abs(view[0] * 65535.0 - ramp).max() < 1
        assert len(np.unique(view)) == 2**16


def test_the_script_for_an_array_job_asks_for_its_part(tmp_path: Path) -> None:
    """Two tasks are submitted again: the part does not depend on how many tasks there are then."""
    stub = tmp_path / "bin" / "miram"
    stub.parent.mkdir()
    stub.write_text('#!/bin/sh\necho "$@"')
    stub.chmod(0o755)
    given = {
        "SOURCE": "rsna",
        "SRC": "/data/rsna",
        "OUT": str(tmp_path / "out"),
        "KEY": "/key",
        "OPTIONS": "--disjoint",
    }
    slurm = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_CPUS_PER_TASK": "8"}
    script = Path(__file__).parent.parent / "docs" / "ingest_array.sbatch"
    environment = os.environ | given | slurm | {"PATH": f"{stub.parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", script], capture_output=True, text=True, check=True, env=environment)
    part = f"{tmp_path / 'out'}.parts/3"
    asked = f"data ingest rsna /data/rsna {part} --key /key --partition 3/32 --workers 8 --disjoint"
    assert done.stdout.split() == asked.split()
