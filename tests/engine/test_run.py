"""The run folder: it belongs to one configuration, says how it ended, and its log is never torn."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml

from miram.engine.config import Section, check
from miram.engine.errors import Preempted, RunFailed, UserError
from miram.engine.run import MetricsFile, Run, open_run, read_metrics


class Data(Section):
    shards: str = "here"
    workers: int = 2
    cache_mb: int = 0


class Part(Section):
    depth: int = 8
    options: dict[str, Any] = {}


class Settings(Section):
    out: str = "runs/x"
    seed: int = 0
    data: Data = Data()
    parts: tuple[Part, ...] = (Part(), Part(options={"m": 64}))


def settings(tree: dict[str, Any] | None = None) -> Settings:
    return check(Settings, tree or {}, "test")


def test_new_run_holds_its_resolved_configuration(tmp_path: Path) -> None:
    run = open_run(settings({"seed": 4}), str(tmp_path / "a" / "run"), "stage")
    assert {path.name for path in run.folder.iterdir()} == {"config.yaml", "inputs.json"}
    saved = yaml.safe_load((run.folder / "config.yaml").read_text())
    assert saved == {
        "out": "runs/x",
        "seed": 4,
        "data": {"shards": "here", "workers": 2, "cache_mb": 0},
        "parts": [{"depth": 8, "options": {}}, {"depth": 8, "options": {"m": 64}}],
    }


@pytest.mark.parametrize("free", [{}, {"out": "elsewhere"}, {"data": {"workers": 0, "cache_mb": 9}}])
def test_run_is_taken_up_again_when_nothing_that_counts_differs(tmp_path: Path, free: dict[str, Any]) -> None:
    first = open_run(settings(), str(tmp_path), "stage")
    before = (tmp_path / "config.yaml").read_bytes()
    assert open_run(settings(free), str(tmp_path), "stage") == first
    assert (tmp_path / "config.yaml").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 1}, "seed was 0, now 1"),
        ({"data": {"shards": "there"}}, "data.shards was 'here', now 'there'"),
        ({"parts": [{"depth": 9}, {"options": {"m": 64}}]}, "parts.0.depth was 8, now 9"),
        ({"parts": [{}, {"options": {"m": 65}}]}, "parts.1.options.m was 64, now 65"),
        ({"parts": [{}]}, "parts.1.depth was 8, now None"),
        ({"parts": []}, "parts.0.depth was 8, now None"),
        ({"seed": 1, "data": {"shards": "x", "workers": 9}}, "(data.shards was 'here', now 'x', seed was 0, now 1)"),
    ],
)
def test_differing_setting_is_refused_with_its_old_and_new_value(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    open_run(settings(), str(tmp_path), "stage")
    with pytest.raises(UserError) as raised:
        open_run(settings(change), str(tmp_path), "stage")
    assert said in str(raised.value)
    assert str(tmp_path) in str(raised.value)
    assert "data.workers" not in str(raised.value)


def test_many_differences_are_counted(tmp_path: Path) -> None:
    open_run(settings(), str(tmp_path), "stage")
    changed = {"seed": 1, "data": {"shards": "x"}, "parts": [{"depth": d, "options": {"m": 1}} for d in (1, 2)]}
    with pytest.raises(UserError, match=r"and [23] more\)"):
        open_run(settings(changed), str(tmp_path), "stage")


def test_folder_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is not empty and is no run"):
        open_run(settings(), str(tmp_path), "stage")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_empty_folder_is_used(tmp_path: Path) -> None:
    open_run(settings(), str(tmp_path), "stage")
    assert (tmp_path / "config.yaml").is_file()


@pytest.mark.parametrize("out", ["file", "file/run"])
def test_file_is_no_run_folder(tmp_path: Path, out: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another --out"):
        open_run(settings(), str(tmp_path / out), "stage")


def state(run: Run) -> dict[str, Any]:
    return json.loads((run.folder / "state.json").read_text())


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (None, "finished", ""),
        (Preempted("stopped after step 3"), "preempted", "stopped after step 3"),
        (RunFailed("loss is\nno number"), "failed", "RunFailed: loss is no number"),
        (KeyError("x"), "failed", "KeyError: 'x'"),
        (KeyboardInterrupt(), "failed", "interrupted; the checkpoints are kept"),
        (SystemExit(3), "failed", "SystemExit: 3"),
    ],
)
def test_state_says_how_the_run_ended(tmp_path: Path, error: BaseException | None, status: str, reason: str) -> None:
    run = Run(tmp_path, "pretrain")
    expectation: AbstractContextManager[Any] = pytest.raises(type(error)) if error else nullcontext()
    with expectation, run.recorded():
        assert state(run)["status"] == "running"
        assert not run.finished
        if error:
            raise error
    assert state(run) == {"schema": "miram.state/1", "stage": "pretrain", "status": status, "reason": reason}
    assert run.finished == (status == "finished")


def test_only_the_writing_rank_records(tmp_path: Path) -> None:
    with Run(tmp_path, "pretrain").recorded(writes=False):
        pass
    with MetricsFile(tmp_path / "metrics.jsonl", 0, writes=False) as metrics:
        metrics.append({"step": 1})
    assert list(tmp_path.iterdir()) == []


def test_run_without_a_state_is_not_finished(tmp_path: Path) -> None:
    assert not Run(tmp_path, "pretrain").finished


def test_metrics_are_on_disk_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path, 0) as metrics:
        for step in (1, 2):
            metrics.append({"step": step, "loss": step / 3})
            assert path.read_text().splitlines()[-1] == json.dumps({"step": step, "loss": step / 3})
            assert path.read_text().endswith("\n")


@pytest.mark.parametrize("resumed", [0, 9, 10, 15, 20, 99])
def test_lines_beyond_the_resumed_step_are_cut(tmp_path: Path, resumed: int) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": step, "loss": 1 / step} for step in (10, 20, 30)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with MetricsFile(path, resumed) as metrics:
        metrics.append({"step": resumed + 1})
    assert read_metrics(path) == [line for line in lines if line["step"] <= resumed] + [{"step": resumed + 1}]


def test_line_torn_at_any_byte_is_left_out_and_cut(tmp_path: Path) -> None:
    path, whole, last = tmp_path / "metrics.jsonl", [{"step": 1, "loss": 0.5}], {"step": 2, "loss": 0.25}
    text = json.dumps(last)
    for written in range(len(text) + 1):
        path.write_text(json.dumps(whole[0]) + "\n" + text[:written])
        expected = whole + [last] * (written == len(text))
        assert read_metrics(path) == expected
        with MetricsFile(path, 2) as metrics:
            metrics.append({"step": 3})
        assert [json.loads(line) for line in path.read_text().splitlines()] == [*expected, {"step": 3}]


def test_results_and_captions_carry_their_schema(tmp_path: Path) -> None:
    run = Run(tmp_path, "probe")
    run.result({"value": 0.5})
    figures = run.caption({"a.png": "A breast."})
    assert json.loads((tmp_path / "result.json").read_text()) == {
        "schema": "miram.result/1",
        "stage": "probe",
        "value": 0.5,
    }
    assert figures == tmp_path / "figures"
    captions = json.loads((figures / "captions.json").read_text())
    assert captions == {"schema": "miram.captions/1", "a.png": "A breast."}


def test_two_processes_never_write_the_same_run(tmp_path: Path) -> None:
    """The lock belongs to one opening of the file: another opening stands for another process."""
    run = open_run(settings(), str(tmp_path / "run"), "stage")
    with run.recorded(), pytest.raises(UserError, match="another process"), run.recorded():
        raise AssertionError("two at once")
    with run.recorded():
        pass
    assert run.finished


def test_a_run_whose_inputs_changed_is_refused(tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    open_run(settings(), out, "stage", {"data": "a", "encoder": "b"})
    open_run(settings(), out, "stage", {"data": "a", "encoder": "b"})
    with pytest.raises(UserError, match="the encoder changed"):
        open_run(settings(), out, "stage", {"data": "a", "encoder": "c"})
