"""The process group of launched processes, and how they find each other at each new start.

torchrun's agents keep one store for all starts of their workers, in which the addresses of the
processes of an earlier start are still to be read: a process that is faster than the others would
connect to one that is no more. So rank 0 draws a name for each start, and gives it to processes
that show that they are there now. The addresses of that start are stored under its name.
"""

import os
import secrets
import time
from datetime import timedelta

from torch import distributed
from torch.distributed import PrefixStore, Store, TCPStore

from pseuzo.launch import launched, rank

SHARED = "TORCHELASTIC_USE_AGENT_STORE"  # torchrun's, "True" where starts share a store
PAUSE = 0.005  # seconds between two looks at the store


def join_group(on_cpu: bool, seconds: float) -> None:
    """Make the default process group of the launched processes, if they have none yet. on_cpu:
    whether they compute on CPUs. seconds: how long one waits for another.

    RuntimeError if the others do not come.
    """
    if launched() == 1 or distributed.is_initialized():
        return
    wait, world = timedelta(seconds=seconds), launched()
    store = None
    if os.environ.get(SHARED) == "True":
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = meet(TCPStore(host, port, world, False, wait), rank(), world, seconds)
    # Messages of ranks are on the CPU. NCCL would end the process if another rank is gone.
    backend = "gloo" if on_cpu else "cpu:gloo,cuda:nccl"
    distributed.init_process_group(
        backend, store=store, rank=rank(), world_size=world, timeout=wait
    )


def meet(store: Store, rank: int, world: int, seconds: float) -> Store:
    """Return the part of a store that belongs to this start alone. All ranks have to call this.

    Each rank other than 0 says a word that it draws, and waits for the answer to that word. What is
    left of other starts has other words, so it neither gets nor gives an answer.
    """
    store = PrefixStore("pseuzo", store)
    until = time.monotonic() + seconds
    if rank:
        mine = secrets.token_hex(8)
        store.set(f"word {rank}", mine)
        name = store.get(f"name for {mine}").decode()  # waits as long as the store does
        store.set(f"{name} heard by {rank}", "")
        return PrefixStore(name, store)
    name, answered = secrets.token_hex(8), dict[int, bytes]()
    missing = set(range(1, world))
    while missing:
        for other in sorted(missing):
            if store.check([f"{name} heard by {other}"]):
                missing.remove(other)
            elif store.check([f"word {other}"]):
                word = store.get(f"word {other}")
                if answered.get(other) != word:
                    store.set(f"name for {word.decode()}", name)
                    answered[other] = word
        if missing and time.monotonic() > until:
            raise RuntimeError(f"rank {', '.join(map(str, sorted(missing)))} did not come")
        time.sleep(PAUSE)
    return PrefixStore(name, store)
