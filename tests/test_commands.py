"""The command line as a newcomer types it."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
import yaml
from PIL import Image

Say = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize(
    "command",
    [
        *("", "data", "data ingest", "pretrain", "probe", "finetune", "segment", "distill", "federate", "flower"),
        *("predict", "evaluate", "export", "report", "demo"),
    ],
)
def test_help_ends_well_and_says_something(command: str, say: Say) -> None:
    code, out, _ = say(*command.split(), "--help")
    assert code == 0
    assert "sage" in out


def test_help_of_a_stage_lists_every_key_with_its_meaning(say: Say) -> None:
    _, out, _ = say("pretrain", "--help")
    for key in ("--train.batch_size", "--model.scales.0.attention", "--data.shards", "--crop.tissue", "pretrain/demo"):
        assert key in out
    assert "images a step, over all ranks" in out


def test_config_prints_what_a_run_would_use(say: Say) -> None:
    code, out, _ = say("config", "pretrain/demo", "--train.steps=7", "--model.scales.1.depth=3")
    tree = yaml.safe_load(out)
    assert code == 0
    assert tree["train"]["steps"] == 7
    assert [scale["depth"] for scale in tree["model"]["scales"]] == [1, 3]
    assert tree["model"]["norm_pix"] is True


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("data", "verify", "nosuch"), "nosuch"),
        (("data", "stats", "nosuch"), "nosuch"),
        (("data", "show", "nosuch"), "nosuch"),
        (("data", "ingest", "mais", ".", "out"), "mias"),
        (("data", "ingest", "mias", "nosuch", "out"), "nosuch"),
        (("pretrain", "pretrain/nosuch"), "nosuch"),
        (("pretrain",), "name a configuration"),
        (("probe", "--seed=1"), "name a configuration"),
        (("finetune",), "name a configuration"),
        (("finetune", "--sweep"), "name a configuration"),
        (("segment", "--sweep"), "name a configuration"),
        (("finetune", "finetune/demo", "--finetune.metod=lora"), "did you mean 'finetune.method'"),
        (("predict", "nosuch", "film.png"), "nosuch"),
        (("evaluate",), "name a run"),
        (("evaluate", "nosuch", "--data.shards=x"), "nosuch"),
        (("distill",), "name a configuration"),
        (("distill", "distill/dem"), "did you mean 'distill/demo'"),
        (("distill", "distill/demo", "--distill.dept=1"), "did you mean 'distill.depth'"),
        (("federate",), "name a configuration"),
        (("federate", "--flower"), "name a configuration"),
        (("federate", "federate/demo", "--federate.round=2"), "did you mean 'federate.rounds'"),
        (("flower",), "no program of Flower's"),
        (("flower", "superlnk"), "did you mean 'superlink'"),
        (("export", "nosuch", "--to", "onnx"), "nosuch"),
        (("export", "nosuch", "--to", "onx"), "did you mean 'onnx'"),
        (("export", "nosuch", "--to", "onnx", "--merge-tokens", "all"), "--merge-tokens all"),
        (("export", "nosuch", "--to", "hf", "--merge-tokens", "8"), "--to onnx only"),
        (("report", "nosuch"), "nosuch"),
    ],
)
def test_what_is_not_there_is_named_in_one_line(arguments: tuple[str, ...], named: str, say: Say) -> None:
    code, _, err = say(*arguments)
    assert code == 2
    assert named in err
    assert len(err.strip().splitlines()) == 1


def test_an_empty_folder_is_refused_and_nothing_is_written(say: Say, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for source in ("mias", "folder"):
        code, _, err = say("data", "ingest", source, tmp_path / "empty", tmp_path / "out")
        assert code == 2
        assert "empty" in err
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]


def test_a_folder_with_a_table_becomes_a_data_set_that_names_what_it_left_out(say: Say, tmp_path: Path) -> None:
    src, rng = tmp_path / "films", np.random.default_rng(0)
    src.mkdir()
    for i in range(4):
        film = np.zeros((120, 100), np.uint16)
        film[10:110, :60] = rng.integers(20000, 40000, (100, 60))
        Image.fromarray(film).save(src / f"film{i}.png")
    (src / "film3.png").write_bytes((src / "film3.png").read_bytes()[:2000])
    (src / "notes.png").write_text("no image")
    rows = [
        "file,patient,laterality,view,tumour",
        *(f"film{i},Jane {i // 2},L,CC,{i % 2}" for i in range(4)),
        "notes,Jane 9,,,1",
    ]
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    key = tmp_path / "key"
    key.write_text("a secret of sixteen bytes or more")
    code, out, err = say(
        "data", "ingest", "folder", src, tmp_path / "set", "--labels", tmp_path / "labels.csv", "--key", key
    )
    assert code == 0
    assert "3 images, 2 left out" in out
    assert "left out film3.png" in err
    assert "left out notes.png" in err
    assert say("data", "verify", tmp_path / "set")[0] == 0
    assert "tumour" in say("data", "stats", tmp_path / "set")[1]
    assert say("data", "show", tmp_path / "set", "--out", tmp_path / "sheet.png")[0] == 0
    assert Image.open(tmp_path / "sheet.png").size[0] > 100
    with (tmp_path / "set" / "index.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["label_tumour"] for row in table] == ["0", "1", "0"]
    assert len({row["patient"] for row in table}) == 2
    assert not any(b"Jane" in path.read_bytes() for path in (tmp_path / "set").iterdir())


def test_damage_is_found_and_named(say: Say, tmp_path: Path) -> None:
    say("data", "phantom", tmp_path / "set", "--patients", 1, "--size", 64)
    shard = tmp_path / "set" / "shard-000000.tar"
    content = bytearray(shard.read_bytes())
    content[5000] ^= 1
    shard.write_bytes(content)
    code, _, err = say("data", "verify", tmp_path / "set")
    assert code == 2
    assert "shard-000000.tar does not match its sha256" in err


def test_a_demo_on_small_data_of_ones_own_runs_to_a_report(
    phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny: list[str]
) -> None:
    """The demo's own code with smaller presets: every stage is called, finished stages are not run again."""
    from miram import demo

    def smaller(stage: Callable[..., object], *extra: str) -> Callable[..., object]:
        return lambda config, arguments: stage(config, [*arguments, *extra])

    rest = [a for a in tiny if not a.startswith(("--data.shards", "--train.batch_size"))]
    monkeypatch.setattr(demo, "pretrain", smaller(demo.pretrain, *rest, "--train.steps=3"))
    few = ("--probe.folds=2", "--probe.inner_folds=2", "--probe.controls=1", "--probe.replicates=20")
    monkeypatch.setattr(demo, "probe", smaller(demo.probe, *few))
    for _ in range(2):
        demo.run_demo(phantoms, "mass", tmp_path / "demo")
        said = capsys.readouterr().out
        assert "AUC of mass" in said
        assert "pretrained - random 1" in said
        assert "report.html" in said
    page = (tmp_path / "demo" / "report.html").read_text()
    assert page.count("data:image/png;base64") == 3  # reconstructions, attention, the probe


def test_the_demo_s_choice_of_a_task_needs_enough_patients_of_every_class(phantoms: Path) -> None:
    from miram.data.shards import ShardDataset
    from miram.demo import choose_task

    shards = ShardDataset(phantoms)
    assert choose_task(shards) in {"mass", "calc", None}  # 12 patients: three of each density, fewer than five folds


def test_version_is_that_of_the_package(miram: Callable[..., CompletedProcess[str]]) -> None:
    import miram as package

    done = miram("--version")
    assert done.stdout.strip() == package.__version__
    assert json.dumps(done.stderr) == '""'
