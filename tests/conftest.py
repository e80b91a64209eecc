"""Shared by all tests: small data sets made once, and the command line as a user meets it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# Runs are compared bit for bit with runs in other processes: one thread everywhere, set before torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"
# And on processors: a GPU gives other bits, and is lost to processes that are forked. MIRAM_GPU=1 runs what needs one.
if not os.environ.get("MIRAM_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

from miram.__main__ import app
from miram.data.phantom import PhantomSettings
from miram.data.sources.phantom import make_phantoms
from miram.engine.errors import exit_code

Command = Callable[..., "subprocess.CompletedProcess[str]"]

ENVIRONMENT = os.environ | {"PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 phantom images of 12 patients, 24 of them in split train."""
    out = tmp_path_factory.mktemp("data") / "phantoms"
    make_phantoms(out, 12, PhantomSettings(size=96, seed=7), workers=1)
    return out


@pytest.fixture(scope="session")
def miram() -> Command:
    """`miram(*arguments)` run as a process of its own."""

    def run(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "miram", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT, **options)  # type: ignore[call-overload]

    return run


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`say("data", "stats", …)` in this process: exit code, output, errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        try:
            code = exit_code(lambda: app([str(a) for a in arguments]))
        except SystemExit as stop:
            code = int(stop.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


TINY = [
    "--model.encoder_options={depth: 2, embed_dim: 32, num_heads: 2}",
    "--model.image_size=32",
    "--model.scales=[{scale: 1, depth: 1, width: 32, heads: 2}, "
    "{scale: 2, attention: nystrom, depth: 1, width: 16, heads: 2, options: {num_landmarks: 4}}]",
    "--train.batch_size=8",
    "--train.log_every=1",
    "--train.blr=0.03",
    "--train.warmup_steps=2",
    "--data.workers=0",
]


@pytest.fixture(scope="session")
def tiny(phantoms: Path) -> list[str]:
    """Overrides that make `pretrain/demo` a matter of seconds."""
    return [f"--data.shards={phantoms}", *TINY]
