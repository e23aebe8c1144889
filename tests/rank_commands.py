"""The command line on each rank of a process group, as torchrun would start it."""

import contextlib
import io
import os

from pseuzo.cli.commands import main


def launched_as(rank: int, world: int) -> dict[str, str]:
    """What torchrun says in the environment. Nothing connects, as the group is there already."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    return {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "localhost"}


def run(rank: int, world: int, of_rank: list[list[str]]) -> tuple[int, str, str]:
    """Run `pseuzo` with the arguments of this rank; return its exit code and what it printed."""
    os.environ.update(launched_as(rank, world))
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(arg) for arg in of_rank[rank]], standalone_mode=True)
        except SystemExit as end:
            code = int(end.code or 0)
    return code, out.getvalue(), err.getvalue()
