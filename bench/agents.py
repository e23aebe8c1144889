"""torchrun's agents as processes of this machine, with runs of `pseuzo train` as their workers.

torchrun starts each worker as a new interpreter, which spends seconds on imports. Here an agent is
forked from this process, and its workers from a server that has imported everything, by the same
`elastic_launch` that torchrun calls. Nothing may be computed in this process before that.
"""

import ctypes
import faulthandler
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import torch
from pseuzo.cli import run as _imported_once  # noqa: F401  # so that workers need not
from pseuzo.cli.commands import main
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

NEW_NETWORK = 0x40000000  # CLONE_NEWNET of linux/sched.h
LIMIT = 900  # seconds, after which a wait is an error


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def work(folder: Path, argv: Sequence[str]) -> None:
    """One rank: run the command, after writing down which process it is."""
    faulthandler.enable()
    torch.set_num_threads(1)
    scratch = folder / f".{os.getpid()}"
    scratch.write_text(f"{os.getpid()} {os.environ['WORLD_SIZE']}")
    scratch.rename(folder / os.environ["RANK"])
    main([str(word) for word in argv], standalone_mode=False)


@dataclass
class Job:
    """What the agents of one run share.

    nodes: the least and the largest number of agents. Where they differ, the store of a start is
    its own: in torch 2.13 an agent that joins would wait for ever for what the first start wrote.
    """

    folder: Path
    argv: Sequence[str]
    nodes: tuple[int, int] = (1, 1)
    restarts: int = 0
    host: str = "127.0.0.1"
    port: int = field(default_factory=free_port)
    hosted: bool = False  # whether an agent keeps the store already, as the first one does

    @property
    def pids(self) -> Path:
        return self.folder / "pids"

    def agent(self, ranks: int, network: str | None = None, local: str = "127.0.0.1"):
        """Start an agent with so many workers. network: a namespace to run in; local: the address
        of this agent there."""
        self.pids.mkdir(parents=True, exist_ok=True)
        process = get_context("fork").Process(target=self._launch, args=(ranks, network, local))
        process.start()
        self.hosted = True
        return process

    def _launch(self, ranks: int, network: str | None, local: str) -> None:
        os.setpgid(0, 0)  # so that the machine of an agent can be lost: the agent and its workers
        if network is not None:
            _enter(network)
            os.environ["GLOO_SOCKET_IFNAME"] = "eth0"
        if self.nodes[0] < self.nodes[1]:
            os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        out = os.open(self.folder / "agents.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        get_context("forkserver").set_forkserver_preload(["agents"])
        logs = DefaultLogsSpecs(log_dir=str(self.folder), redirects=Std.ALL)
        config = LaunchConfig(
            min_nodes=self.nodes[0],
            max_nodes=self.nodes[1],
            nproc_per_node=ranks,
            run_id="elastic",
            rdzv_backend="c10d",
            rdzv_endpoint=f"{self.host}:{self.port}",
            rdzv_configs={"timeout": LIMIT, "last_call_timeout": 2, "is_host": not self.hosted},
            max_restarts=self.restarts,
            monitor_interval=0.1,
            start_method="forkserver",
            local_addr=local,
            logs_specs=logs,
            shutdown_timeout=3,
        )
        try:
            elastic_launch(config, work)(self.pids, self.argv)
        except BaseException as error:
            print(f"agent: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)

    def ranks(self) -> dict[int, tuple[int, int]]:
        """The ranks that run: rank -> its process and how many ranks it says there are."""
        found = {}
        for path in self.pids.glob("[0-9]*"):
            pid, world = map(int, path.read_text().split())
            if running(pid):
                found[int(path.name)] = pid, world
        return found


def running(pid: int) -> bool:
    """Whether a process is there, and not only its exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait(until: Callable[[], bool], agents: Sequence, what: str) -> None:
    """Wait for something to happen. RuntimeError if an agent ends before, or if it takes long."""
    began = time.monotonic()
    while not until():
        if any(agent.exitcode is not None for agent in agents):
            raise RuntimeError(f"an agent ended before {what}")
        if time.monotonic() - began > LIMIT:
            raise RuntimeError(f"waited {LIMIT} s for {what}")
        time.sleep(0.01)


def lose(agent) -> None:
    """Kill an agent and its workers, as the loss of their machine would."""
    os.killpg(agent.pid, signal.SIGKILL)
    agent.join()


def end(agents: Sequence) -> None:
    for agent in agents:
        if agent.exitcode is None:
            lose(agent)


def _enter(network: str) -> None:
    with open(f"/var/run/netns/{network}") as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), NEW_NETWORK):
            raise OSError(ctypes.get_errno(), f"cannot enter the namespace {network}")
