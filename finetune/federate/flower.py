"""Real sites, by Flower (https://flower.ai, pip install 'miram[federated]'): the app's folder, and its programs.

    FOLDER/pyproject.toml    all of the app: names of the two halves (flower_app.py), the plan, and how long to wait

    server    miram flower superlink …                                takes connections, keeps what travels
    site      miram flower supernode … --node-config "site='SITE.yaml'"
    server    miram flower flwr run FOLDER CONNECTION --stream

The programs are Flower's own, without what they do by default beside their work: telemetry, looking for updates, and
installing packages for an app. Whoever wants those sets the variables of QUIET.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NoReturn

import yaml

from ...engine.errors import UserError, did_you_mean, exit_code
from ...engine.files import write_atomic
from ...version import __version__

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
PROGRAMS = {"superlink": "flower-superlink", "supernode": "flower-supernode", "flwr": "flwr"}
HALVES = {
    "serverapp": "miram.finetune.federate.flower_app:server",
    "clientapp": "miram.finetune.federate.flower_app:client",
}
WAIT, PATIENCE = 600, 43200  # seconds: for sites to connect, for a round; the second is Flower's own


def write_app(folder: Path, plan: str, sites: int, halves: Mapping[str, str] = HALVES) -> Path:
    """Write the app that `flwr run` sends to all sites: the plan, and where in the installed miram the code is.

    Args:
        folder: of the app; its pyproject.toml is replaced if there is one.
        plan: YAML of what all sites do. They all read it.
        sites: how many to wait for.
        halves: where the server's and the site's code is.

    Returns:
        the pyproject.toml.

    Raises:
        UserError: Flower is not installed, or the plan names a place on this machine.
    """
    need_flower()
    import tomli_w

    if local := next(absolute(yaml.safe_load(plan)), None):
        raise UserError(f"the plan names {local}, a place on this machine, and every site would read it; leave it out")
    app = {
        "publisher": "miram",
        "fab-exclude": ["**/*"],  # what else lies in the folder stays there; this file goes in any case
        "components": dict(halves),
        "config": {"plan": plan, "sites": sites, "wait": WAIT, "patience": PATIENCE},
    }
    about = {
        "name": "miram-federate",
        "version": __version__,
        "description": "Federated tuning",
        "license": "Apache-2.0",
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "pyproject.toml"
    write_atomic(path, tomli_w.dumps({"project": about, "tool": {"flwr": {"app": app}}}).encode())
    return path


def absolute(tree: Any) -> Iterator[str]:
    """Every word of a tree that is an absolute path, or one in a home folder."""
    if isinstance(tree, dict):
        for value in tree.values():
            yield from absolute(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from absolute(value)
    elif isinstance(tree, str):
        pure = PurePosixPath(tree).is_absolute(), PureWindowsPath(tree).is_absolute(), tree.startswith("~")
        if any(pure):
            yield tree


def environment() -> dict[str, str]:
    """Of Flower's programs: they find one another, and are quiet unless told otherwise."""
    here = str(Path(sys.executable).parent)
    return QUIET | os.environ | {"PATH": os.pathsep.join([here, os.environ.get("PATH", "")])}


def launch(arguments: Sequence[str]) -> NoReturn:
    """Become one of Flower's programs.

    Args:
        arguments: superlink, supernode or flwr, then what the program takes.

    Raises:
        UserError: Flower is not installed, or this is none of them.
    """
    need_flower()
    name = arguments[0] if arguments else ""
    if name not in PROGRAMS:
        raise UserError(f"{name or 'nothing'} is no program of Flower's{did_you_mean(name, [*PROGRAMS])}")
    program = Path(sys.executable).parent / PROGRAMS[name]
    os.execve(program, [program.name, *arguments[1:]], environment())


def need_flower() -> None:
    """Raises UserError where Flower is not installed."""
    if find_spec("flwr") is None:
        raise UserError("federated tuning at real sites needs Flower: pip install 'miram[federated]'")


if __name__ == "__main__":
    sys.exit(exit_code(lambda: launch(sys.argv[1:])))
