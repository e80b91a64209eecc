"""Flower on one machine: its grid without a server, and its real programs on free ports."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from miram.finetune.federate.flower_wire import ReadSite, client_app


class Wire:
    """Flower's grid without its server: nodes are called in this process, by what their messages are as bytes."""

    def __init__(self, sites: dict[int, str], plan: str, read_site: ReadSite):
        self.plan, self.read_site = plan, read_site
        self.sites, self.replies, self.bytes = dict(sites), {}, b""
        self.gone: set[int] = set()
        self.forged: dict[int, Callable[[Message], Message]] = {}

    def get_node_ids(self) -> list[int]:
        return list(self.sites)

    def push_messages(self, messages: list[Message]) -> list[str]:
        for message in messages:
            message.metadata.__dict__["_message_id"] = message.object_id
            node, here = message.metadata.dst_node_id, self.travelled(message)
            if node not in self.gone:
                reply = self.forged.get(node, self.client(node))(here)
                self.replies[message.object_id] = self.travelled(reply)
        return [message.object_id for message in messages]

    def pull_messages(self, numbers: list[str]) -> list[Message]:
        return [self.replies.pop(number) for number in numbers if number in self.replies]

    def client(self, node: int) -> Callable[[Message], Message]:
        context = Context(1, node, {"site": self.sites[node]}, RecordDict(), {"plan": self.plan})
        return lambda message: client_app(self.read_site)(message, context)

    def travelled(self, message: Message) -> Message:
        contents = {number: each.deflate() for number, each in get_all_nested_objects(message).items()}
        self.bytes += b"\n".join(contents.values())
        there = inflate_object_from_contents(message.object_id, dict(contents))
        there.metadata.__dict__["_message_id"] = message.object_id
        return there


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def started(folder: Path, name: str, *arguments: str, env: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """One of Flower's programs in a session of its own, all of which ends here."""
    (folder / name).mkdir()
    command = [sys.executable, "-m", "miram.finetune.federate.flower", *arguments]
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder / name, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(15)
        with suppress(ProcessLookupError):  # what it started may outlive it
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_on_loopback(folder: Path, sites: dict[str, str], **settings: str) -> None:
    """The app in FOLDER/app on a superlink and a supernode for each site, by their YAML files; ends when it has ended.

    What a program says is in FOLDER/NAME.log; the superlink is called link.
    """
    ports = [free_port() for _ in range(1 + len(sites))]
    home = folder / "home"
    home.mkdir()
    (home / "config.toml").write_text(f'[superlink.here]\naddress = "127.0.0.1:{ports[0]}"\ninsecure = true\n')
    env = {name: value for name, value in os.environ.items() if "FLWR" not in name}
    env |= {"FLWR_HOME": str(home), "OMP_NUM_THREADS": "1"} | settings
    address = ["--insecure", "--host", "127.0.0.1", "--port"]
    with ExitStack() as stack:
        stack.enter_context(started(folder, "link", "superlink", *address, str(ports[0]), env=env))
        for (name, place), port in zip(sites.items(), ports[1:], strict=True):
            node = ("supernode", "--superlink", f"127.0.0.1:{ports[0]}", *address, str(port))
            stack.enter_context(started(folder, name, *node, "--node-config", f"site='{place}'", env=env))
        run(folder, env)


def run(folder: Path, env: dict[str, str]) -> None:
    """`flwr run`, again until the server is up, then wait for its end."""
    command = [sys.executable, "-m", "miram.finetune.federate.flower", "flwr"]
    end, said = time.monotonic() + 900, {}
    while not said.get("success") and time.monotonic() < end:
        said = json.loads(asked([*command, "run", str(folder / "app"), "here", "--format", "json"], env))
    while time.monotonic() < end:
        (one,) = json.loads(asked([*command, "ls", "here", "--format", "json"], env))["runs"]
        if one["status"].startswith("finished"):
            log = asked([*command, "log", one["run-id"], "here", "--show"], env)
            assert one["status"] == "finished:completed", log
            return
    raise AssertionError((folder / "link.log").read_text()[-3000:])


def asked(command: list[str], env: dict[str, str]) -> str:
    time.sleep(0.5)
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60).stdout
