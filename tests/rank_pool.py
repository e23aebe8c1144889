"""Processes that form process groups of any size, started once for many checks.

They are forked from a server that has imported torch, so each costs little. A function that they
run must be one of an importable module.
"""

import itertools
import multiprocessing
import os
import traceback
from datetime import timedelta
from pathlib import Path

# What torch imports at the first step of an optimizer and at the first forward derivative.
LATER = ("torch._dynamo", "torch._decomp.decompositions_for_jvp")
LIMIT = 240  # seconds, after which a wait is an error


class RankError(Exception):
    """What a rank raised: its type's name, and its message."""

    def __init__(self, kind: str, message: str, trace: str):
        super().__init__(kind, message, trace)  # so that it can be pickled
        self.kind, self.message = kind, message

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}\n{self.args[2]}"


class RankPool:
    """`run` runs a function on the ranks of a new group, and returns what each returned.

    environments: the variables of each process, set before anything is computed in it. preload:
    modules that the server imports, unless it has been started already.
    """

    def __init__(
        self,
        folder: Path,
        environments: list[dict[str, str]],
        preload: tuple[str, ...] = ("pseuzo.optim", "pseuzo.train.journal"),
    ):
        self._stores = (folder / f"store{i}" for i in itertools.count())
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*LATER, *preload])
        self._pipes, self.processes = [], []
        for rank, environment in enumerate(environments):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, environment), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self.processes.append(process)

    def start(self, world, function, *args, limit=LIMIT):
        """Start function(rank, *args) on ranks 0 .. world - 1."""
        store = str(next(self._stores))
        for pipe in self._pipes[:world]:
            pipe.send((world, store, limit, function, args))

    def results(self, world):
        """What each rank returned: a value, or a RankError, or EOFError if it died."""
        found = []
        for pipe in self._pipes[:world]:
            try:
                assert pipe.poll(LIMIT), "a rank does not answer"
                found.append(pipe.recv())
            except EOFError as error:
                found.append(error)
        return found

    def run(self, world, function, *args, limit=LIMIT):
        """The results of all ranks. Raises what a rank raised."""
        self.start(world, function, *args, limit=limit)
        found = self.results(world)
        for result in found:
            if isinstance(result, Exception):
                raise result
        return found

    def close(self):
        for pipe in self._pipes:
            pipe.close()
        for process in self.processes:
            process.join(LIMIT)


def _serve(pipe, rank, environment):
    os.environ.update(environment)
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    while True:
        try:
            world, store, limit, function, args = pipe.recv()
        except (EOFError, OSError):
            return
        if distributed.is_initialized():  # all ranks have answered, so none needs the last group
            distributed.destroy_process_group()
        try:
            distributed.init_process_group(
                "gloo",
                init_method=f"file://{store}",
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=limit),
            )
            pipe.send(function(rank, *args))
        except Exception as error:
            pipe.send(RankError(type(error).__name__, str(error), traceback.format_exc()))
