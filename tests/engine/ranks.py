"""Ranks as forked processes: what torchrun does, without the seconds that importing torch takes."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch.distributed
from accelerate.state import AcceleratorState

fork = multiprocessing.get_context("fork")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def on_ranks(world: int, work: Callable[[], Any], timeout: float = 120) -> list[Any]:
    """What `work` returned, or the exception it raised, on each of `world` gloo ranks; None of a rank that was killed.

    A rank that has not ended in time is killed, and counts as a hang.
    """
    port, results = free_port(), fork.SimpleQueue()
    processes = [fork.Process(target=_rank, args=(rank, world, port, work, results)) for rank in range(world)]
    for process in processes:
        process.start()
    found: dict[int, Any] = {}
    for process in processes:
        process.join(timeout)
    hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    while not results.empty():
        rank, result = results.get()
        found[rank] = pickle.loads(result)
    assert not hung, f"ranks {hung} hung"
    return [found.get(rank) for rank in range(world)]


def _rank(rank: int, world: int, port: int, work: Callable[[], Any], results: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(world)}
    AcceleratorState._reset_state(True)
    try:
        result = work()
    except BaseException as error:
        traceback.print_exc()
        result = error
    results.put((rank, pickle.dumps(result)))  # tensors by value: those who own shared memory are gone by then
    if torch.distributed.is_initialized() and not isinstance(result, BaseException):
        torch.distributed.destroy_process_group()
    os._exit(0)
