"""What docs/cluster.md, docs/pretrain.sbatch and configs/accelerate tell users: names exist, scripts decide rightly."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from miram.engine.config import keys, presets
from miram.engine.launch import strategy
from miram.engine.run import FREE
from miram.pretrain.config import PretrainConfig

ROOT = Path(__file__).parents[1]
PRESETS = resources.files("miram") / "configs" / "accelerate"
SBATCH, PAGE = ROOT / "docs" / "pretrain.sbatch", ROOT / "docs" / "cluster.md"
NAMES = ["ddp", "fsdp2", "single", "two_nodes"]
KEYS = {key for key, *_ in keys(PretrainConfig)}


def launched(name: str, *flags: str) -> tuple[object, dict[str, str]]:
    """What `accelerate launch` makes of a preset: arguments for torchrun, and the ranks' environment."""
    asked = ["--config_file", str(PRESETS / f"{name}.yaml"), *flags, "-m", "miram.pretrain"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(asked))
    return arguments, prepare_multi_gpu_env(arguments)


def test_accelerate_reads_every_preset_and_none_sets_a_precision() -> None:
    assert sorted(file.name for file in PRESETS.iterdir()) == [f"{name}.yaml" for name in NAMES]
    for name in NAMES:
        assert load_config_from_file(str(PRESETS / f"{name}.yaml")).mixed_precision is None


def test_presets_of_accelerate_are_no_presets_of_miram() -> None:
    assert not [name for name in presets() if name.startswith("accelerate/")]


@pytest.mark.parametrize(("name", "shared"), [("ddp", "ddp"), ("fsdp2", "fsdp2")])
def test_what_a_preset_asks_for_is_how_ranks_share_the_model(
    name: str, shared: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, environment = launched(name, "--num_processes", "4")
    assert arguments.nproc_per_node == "4"  # type: ignore[attr-defined]
    for variable in ("ACCELERATE_USE_FSDP", "FSDP_VERSION"):
        monkeypatch.delenv(variable, raising=False)
        if variable in environment:
            monkeypatch.setenv(variable, environment[variable])
    assert strategy("auto", world=2) == shared


def test_two_nodes_divide_the_processes_and_meet_at_the_first() -> None:
    flags = ("--num_processes", "16", "--machine_rank", "1", "--main_process_ip", "node1")
    arguments, _ = launched("two_nodes", *flags)
    told = vars(arguments)  # type: ignore[arg-type]
    assert (told["nnodes"], told["nproc_per_node"], told["node_rank"]) == ("2", "8", 1)
    assert told["rdzv_endpoint"] == "node1:29500"


def test_a_preset_for_many_asks_how_many() -> None:
    with pytest.raises(ValueError, match="num_processes"):
        launched("ddp")


@pytest.mark.parametrize("script", [SBATCH, ROOT / "benchmarks" / "multi_gpu.sh"])
def test_bash_can_parse(script: Path) -> None:
    assert subprocess.run(["bash", "-n", script], capture_output=True).returncode == 0


@pytest.mark.parametrize("page", [SBATCH, PAGE])
def test_keys_files_and_presets_that_are_named_exist(page: Path) -> None:
    text = page.read_text().replace("$PRESETS/", "")
    named = set(re.findall(r"--((?:train|data|model|monitor)\.[\w.]+)", text))
    assert named
    assert named <= KEYS
    assert set(re.findall(r"\b(pretrain/\w+)(?![\w.])", text)) <= set(presets())
    places = [ROOT, ROOT / "docs", Path(str(PRESETS))]
    for path in set(re.findall(r"[\w/]+\.(?:yaml|sh|py|sbatch|md)\b", text)):
        assert any((place / path.lstrip("/")).is_file() for place in places), path


def test_the_page_lists_all_keys_that_may_change() -> None:
    paragraph = next(part for part in PAGE.read_text().split("\n\n") if part.startswith("**Keys that may change**"))
    assert set(re.findall(r"--([a-z_.]+)", paragraph)) == {key for key in FREE if "*" not in key}
    assert {key for key in FREE if "*" in key} == {"monitor.*", "model.scales.*.checkpointing"}  # said in words


# ------------------------------------------------------------------------------------------ the Slurm script


SRUN = """#!/bin/bash
printf '%s\\n' "$@" >"$OUT/../arguments"
[ -z "$NEW" ] || mkdir -p "$OUT/checkpoints/$NEW"
[ -z "$STATUS" ] || printf '{"schema": "miram.state/1", "status": "%s"}' "$STATUS" >"$OUT/state.json"
exit 1
"""
SCONTROL = """#!/bin/bash
if [ "$1" = requeue ]; then touch "$OUT/../requeued"; else echo node1; echo node2; fi
"""


def submitted(folder: Path, before: str, after: str, new: str = "", restarts: int = 3) -> tuple[int, bool]:
    """The script where state.json said `before` and srun leaves `after` and a new checkpoint: (exit code, requeued)."""
    tools, out = folder / "tools", folder / "run"
    tools.mkdir()
    (out / "checkpoints" / "step-00000005").mkdir(parents=True)
    if before:
        (out / "state.json").write_text(json.dumps({"status": before}))
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "41234", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2"}
    path = f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    slurm |= {"SLURM_RESTART_COUNT": str(restarts)}
    environment = os.environ | slurm | {"PATH": path, "OUT": str(out), "STATUS": after, "NEW": new}
    command = ["bash", SBATCH, "pretrain/demo", "--data.shards=a folder"]
    code = subprocess.run(command, env=environment, capture_output=True, timeout=60).returncode
    return code, (folder / "requeued").exists()


@pytest.mark.parametrize(
    ("before", "after", "new", "outcome"),
    [
        ("", "finished", "", (0, False)),
        ("finished", "", "", (0, False)),
        ("", "preempted", "step-00000007", (0, True)),
        ("preempted", "preempted", "step-00000007", (0, True)),
        ("preempted", "", "", (1, False)),  # refused at once: what state.json says is of the time before
        ("", "", "", (1, False)),
        ("preempted", "failed", "step-00000007", (1, False)),
        ("", "running", "step-00000010", (0, True)),
        ("preempted", "running", "", (1, False)),  # killed without getting further: it would be again
    ],
)
def test_the_slurm_script_decides_by_what_the_run_folder_says(
    before: str, after: str, new: str, outcome: tuple[int, bool], tmp_path: Path
) -> None:
    assert submitted(tmp_path, before, after, new) == outcome


@pytest.mark.parametrize(("restarts", "outcome"), [(0, (0, True)), (2, (0, True)), (3, (1, False))])
def test_a_job_that_was_killed_before_its_first_checkpoint_is_tried_three_times(
    restarts: int, outcome: tuple[int, bool], tmp_path: Path
) -> None:
    assert submitted(tmp_path, "", "running", "", restarts) == outcome


def test_the_slurm_script_starts_torchrun_on_all_nodes_with_the_arguments_as_given(tmp_path: Path) -> None:
    submitted(tmp_path, "", "finished")
    said = (tmp_path / "arguments").read_text().splitlines()
    assert said[said.index("-m") :] == [
        "-m",
        "miram.pretrain",
        "pretrain/demo",
        "--data.shards=a folder",
        f"--out={tmp_path / 'run'}",
    ]
    for flag in ("--nnodes=2", "--rdzv-endpoint=node1:21234", "--signals-to-handle=SIGTERM,SIGUSR1,SIGINT"):
        assert flag in said


# ------------------------------------------------------------------------------------------ an agent that restarts


def ranks(arguments: list[str], *flags: str) -> subprocess.Popen[bytes]:
    """Two ranks under torchrun."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *flags]
    command = [*launch, "-m", "miram.pretrain", "pretrain/demo", *arguments]
    # Else ranks started anew find the addresses of the dead in torchrun's store, and wait for them (docs/cluster.md).
    environment = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)


def process_of_rank(agent: int, rank: int) -> int:
    """The agent's child that has this rank."""
    children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    wanted = f"RANK={rank}".encode()
    (found,) = [pid for pid in children if wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")]
    return int(found)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_was_killed_is_restarted_by_torchrun_and_leaves_no_trace(
    rank: int, tiny: list[str], tmp_path: Path
) -> None:
    rest = [*tiny, "--train.steps=40", "--train.checkpoint_every=6"]
    assert ranks([*rest, f"--out={tmp_path / 'calm'}"]).wait(timeout=300) == 0
    out = tmp_path / "struck"
    agent = ranks([*rest, f"--out={out}"], "--max-restarts=1")
    while not (out / "checkpoints" / "step-00000006").exists():
        assert agent.poll() is None, "the run ended before it could be struck"
        time.sleep(0.02)
    os.kill(process_of_rank(agent.pid, rank), signal.SIGKILL)
    assert json.loads((out / "state.json").read_text())["status"] != "finished"
    assert agent.wait(timeout=300) == 0
    assert (out / "encoder.safetensors").read_bytes() == (tmp_path / "calm" / "encoder.safetensors").read_bytes()
