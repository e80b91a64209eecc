"""The command line of a stage, as a process: its flag, its help, a configuration that is missing, and signals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

STAGE = """
import atexit, json, os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell without job control has it ignored after `&`
from miram.engine.command import start_stage
from miram.engine.config import Section
from miram.engine.errors import exit_code

class Settings(Section):
    depth: int = 3
    \"\"\"how deep\"\"\"

def stage(config, arguments=(), *, sweeps, signals):
    if config == "interrupted":
        os.kill(os.getpid(), signal.SIGINT)
    if config == "training":
        with signals.training():
            os.kill(os.getpid(), signal.SIGINT)
    if config == "failing":
        raise KeyError("nobody's mistake")
    print(json.dumps([config, list(arguments), sweeps, signals.received]))

def load():
    sent = os.environ.get("SENT")
    if sent:
        os.kill(os.getpid(), getattr(signal, sent))
    return Settings, stage

atexit.register(print, "cleaned up")
before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
about = ["Does a thing.", "  --sweep    many of them"]
code = exit_code(lambda: start_stage("miram thing", sys.argv[1:], load, ("--sweep", "sweeps"), about))
assert before == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
sys.exit(code)
"""


Start = Callable[..., tuple[int, list[str], str]]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Starts such a stage: exit code, lines of output, errors."""
    script = tmp_path / "stage.py"  # a file: the meaning of a key is read from its source
    script.write_text(STAGE)

    def started(*arguments: str, sent: str = "") -> tuple[int, list[str], str]:
        command, environment = [sys.executable, str(script), *arguments], os.environ | {"SENT": sent}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
        return done.returncode, done.stdout.splitlines(), done.stderr

    return started


@pytest.mark.parametrize(
    ("arguments", "rest", "sweeps"),
    [
        (["x.yaml"], [], False),
        (["x.yaml", "--sweep"], [], True),
        (["--sweep", "x.yaml", "--depth=4"], ["--depth=4"], True),
        (["x.yaml", "--sweep.depth=4"], ["--sweep.depth=4"], False),
    ],
)
def test_the_flag_is_the_stages_wherever_it_stands_and_the_rest_are_settings(
    arguments: list[str], rest: list[str], sweeps: bool, start: Start
) -> None:
    code, (told, *_), errors = start(*arguments)
    assert json.loads(told) == ["x.yaml", rest, sweeps, ""]
    assert (code, errors) == (0, "")


@pytest.mark.parametrize("arguments", [["--help"], ["x.yaml", "--sweep", "-h"]])
def test_help_says_what_the_command_does_and_every_key_and_runs_nothing(arguments: list[str], start: Start) -> None:
    code, lines, errors = start(*arguments)
    assert (code, errors) == (0, "")
    assert lines[0] == "usage: miram thing CONFIG [--section.key=value …]"
    assert {"Does a thing.", "  --sweep    many of them", "      how deep"} <= set(lines)
    assert any(line.startswith("  --depth  ") and line.endswith("[3]") for line in lines)
    assert not [line for line in lines if line.startswith("[")]


@pytest.mark.parametrize("arguments", [[], ["--sweep"], ["--depth=4"]])
def test_a_configuration_that_is_not_named_is_asked_for(arguments: list[str], start: Start) -> None:
    code, _, errors = start(*arguments)
    assert code == 2
    assert errors.startswith("miram: name a configuration first: miram thing CONFIG …; presets: ")


@pytest.mark.parametrize("when", ["while it loads", "while it runs"])
def test_ctrl_c_ends_it_at_once_with_one_line_and_no_clean_up(when: str, start: Start) -> None:
    code, lines, errors = start("interrupted") if when == "while it runs" else start("x.yaml", sent="SIGINT")
    assert code == 1
    assert errors.splitlines() == ["miram: interrupted; what was saved before is kept"]
    assert lines == []


def test_ctrl_c_of_a_training_is_left_to_the_training(start: Start) -> None:
    code, (told, *_), errors = start("training")
    assert (code, json.loads(told)[-1]) == (0, "SIGINT")
    assert "saving after this step" in errors


@pytest.mark.parametrize("sent", ["SIGTERM", "SIGUSR1"])
def test_a_queues_signal_that_comes_while_it_loads_is_told_to_the_stage(sent: str, start: Start) -> None:
    code, (told, *_), _ = start("x.yaml", "--sweep", sent=sent)
    assert code == 0
    assert json.loads(told) == ["x.yaml", [], True, sent]


def test_what_nobody_foresaw_keeps_its_traceback(start: Start) -> None:
    code, _, errors = start("failing")
    assert code == 1
    assert errors.startswith("Traceback")
    assert "nobody's mistake" in errors
