"""Predicts the time of a step's messages for 8 to 1024 ranks, and measures what it can here.

python bench/ranks_plan.py [--only bytes] [--only times] [--only delays] [--only stragglers]

Bytes: those that the ranks of a real process group (gloo, loopback) count in a step. Time of a
round, with N ranks:

    3 round trips + (N - 1) (up + down) / bandwidth + own + (N - 1) per_rank

A message is a header and a body, and gloo sends each when the receiver has asked for it. So a
message that rank 0 waits for takes 1.5 round trips, and its answer 1.5. Rank 0 asks all ranks at
once. own and per_rank are the CPU time of rank 0 in a step of a tiny module, measured here with few
ranks. A delay is measured between two namespaces, which takes root.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from pseuzo import MeZO, PseuZO
from slow_network import End, slow_network, why_not
from torch import distributed, nn

WIDTH, GROUPS, WINDOW = 2048, 2, 14  # of OPT-1.3B's outputs, of a task's labels, of PseuZO
ROUND_TRIPS = 3  # of a round: 1.5 for a message that is waited for, and 1.5 for its answer
RANKS = (8, 64, 1024)


@dataclass(frozen=True)
class Case:
    """A method and what a rank has of a batch. few, more: numbers of ranks to measure with."""

    rows: int = 16
    positions: int = 1
    grouped: bool = True
    few: int = 2
    more: int = 8


CASES = {
    "mezo": Case(),
    "pseuzo, groups": Case(),
    "pseuzo, rows": Case(positions=50, grouped=False, more=4),
}


@dataclass(frozen=True)
class Link:
    """round_trip: seconds. bandwidth: of rank 0, bytes per second."""

    name: str
    round_trip: float
    bandwidth: float


LINKS = (
    Link("NCCL", 40e-6, 25e9),
    Link("10 Gb/s", 100e-6, 1.25e9),
    Link("internet", 100e-3, 12.5e6),
)


@dataclass(frozen=True)
class Found:
    """What a rank found. up, down: bytes of a step that rank 1 sent and received. cpu, wall:
    the least and the median seconds of a step, as other processes may use the cores."""

    up: int
    down: int
    cpu: float
    wall: float


@dataclass(frozen=True)
class Costs:
    """Bytes of a step from and to a rank; seconds of rank 0 for itself, and for each other rank."""

    up: int
    down: int
    own: float
    per_rank: float


def work(rank: int, ranks: int, store: str, name: str, steps: int) -> Found:
    """One rank's steps: first those that fill the window, then as many as `steps`."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=ranks)
    torch.manual_seed(0)
    case, model = CASES[name], nn.Linear(8, WIDTH)
    x = torch.randn(case.rows, *[case.positions] * (case.positions > 1), 8)
    labels = torch.arange(case.rows) % GROUPS if case.grouped else None

    def head(output: torch.Tensor) -> torch.Tensor:
        return output.square().mean()

    mezo = name == "mezo"
    o = MeZO(model) if mezo else PseuZO(model, window=WINDOW)
    given = [lambda: head(model(x))] if mezo else [lambda: model(x), head, labels]
    for _ in range(3 if mezo else WINDOW + 1):
        o.step(*given, size=case.rows)
    sent, received, cpus, walls = o.ranks.sent, o.ranks.received, [], []
    for _ in range(steps):
        wall, cpu = time.perf_counter(), time.process_time()
        o.step(*given, size=case.rows)
        cpus.append(time.process_time() - cpu)
        walls.append(time.perf_counter() - wall)
    up, down = (o.ranks.sent - sent) // steps, (o.ranks.received - received) // steps
    distributed.destroy_process_group()
    return Found(up, down, min(cpus), statistics.median(walls))


def launch(name: str, ranks: int, steps: int, ends: tuple[End, End] | None = None) -> list[Found]:
    """What the ranks of a process group find. ends: rank 0 is in the first namespace, the others
    are in the second; None: all are on loopback."""
    device = "lo" if ends is None else ends[0].device
    env = os.environ | {"GLOO_SOCKET_IFNAME": device, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for rank in range(ranks):
            enter = [] if ends is None else ends[min(rank, 1)].enter
            job = json.dumps([rank, ranks, str(Path(folder, "store")), name, steps])
            command = [*enter, sys.executable, __file__, "--work", job]
            started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
        try:
            said = [process.communicate(timeout=600)[0] for process in started]
        finally:
            for process in started:
                process.kill()
    return [Found(*json.loads(line)) for line in said]


def costs(name: str, steps: int) -> Costs:
    case = CASES[name]
    few, more = (launch(name, n, steps) for n in (case.few, case.more))
    per_rank = max(0.0, (more[0].cpu - few[0].cpu) / (case.more - case.few))
    return Costs(few[1].up, few[1].down, few[0].cpu - (case.few - 1) * per_rank, per_rank)


def seconds(link: Link, ranks: int, c: Costs) -> float:
    """The predicted time of a step without a model's passes."""
    moved = (c.up + c.down) / link.bandwidth
    return ROUND_TRIPS * link.round_trip + c.own + (ranks - 1) * (moved + c.per_rank)


def slowdown(ranks: int, spread: float, slow: float = 1.0, draws: int = 4000) -> float:
    """E max_r t_r / E t over ranks, t log-normal with a standard deviation of `spread` of its log.
    slow: what the time of one of the ranks is multiplied by."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(draws, ranks, generator=generator, dtype=torch.float64)
    times = (spread * drawn - spread**2 / 2).exp()  # with a mean of 1
    times[:, 0] *= slow
    return float(times.amax(1).mean())


def table(columns: list[str], rows: list[list[object]]) -> None:
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(f'{x:.3g}' if isinstance(x, float) else str(x) for x in row)} |")
    sys.stdout.flush()


def of_size(n: float) -> str:
    unit, name = next(
        (u, w) for u, w in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")) if n >= u
    )
    return f"{n / unit:.3g} {name}"


def of_time(t: float) -> str:
    return f"{t:.3g} s" if t >= 1 else f"{1e3 * t:.3g} ms"


def delays(measured: dict[str, Costs], ms: list[float], ranks: list[int], steps: int) -> None:
    """Steps between two namespaces against what is predicted."""
    if reason := why_not():
        print(f"delays: left out, as {reason}")
        return
    rows = []
    for name, c in measured.items():
        for n in ranks:
            for delay in ms:
                with slow_network(delay / 1000, 0.0) as (one, other, _):
                    wall = launch(name, n, steps, (one, other))[0].wall
                expected = seconds(Link("", 2 * delay / 1000, 12.5e9), n, c)
                shown = of_time(expected), of_time(wall)
                rows.append([name, n, f"{delay:g} ms", *shown, expected / wall])
    table(["case", "ranks", "delay each way", "predicted", "measured", "ratio"], rows)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ["bytes", "times", "delays", "stragglers"]
    p.add_argument("--only", choices=parts, action="append")
    p.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    p.add_argument("--steps", type=int, default=20)
    p.add_argument("--ms", type=float, nargs="+", default=[0.0, 5.0, 50.0])
    p.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="of the delays")
    p.add_argument("--work", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.work:
        print(json.dumps(astuple(work(*json.loads(args.work)))))
        return
    wanted, measured = args.only or parts, {}
    if set(wanted) != {"stragglers"}:
        measured = {name: costs(name, args.steps) for name in args.cases}
    of_ranks = [f"{n} ranks" for n in RANKS]
    if "bytes" in wanted:
        rows = []
        for name, c in measured.items():
            at_root = (of_size((n - 1) * (c.up + c.down)) for n in RANKS)
            rows.append([name, of_size(c.up), of_size(c.down), *at_root])
        table(["case", "a rank sends", "and gets", *(f"rank 0, {n}" for n in of_ranks)], rows)
    if "times" in wanted:
        rows = []
        for name, c in measured.items():
            print(f"{name}: rank 0 takes {of_time(c.own)} and {of_time(c.per_rank)} a rank")
            for link in LINKS:
                rows.append([name, link.name, *(of_time(seconds(link, n, c)) for n in RANKS)])
        table(["case", "link", *of_ranks], rows)
    if "delays" in wanted:
        small = {name: c for name, c in measured.items() if CASES[name].grouped}
        delays(small, args.ms, args.ranks, args.steps)
    if "stragglers" in wanted:
        rows = []
        for slow in (1.0, 2.0):
            for spread in (0.05, 0.2):
                cells = (slowdown(n, spread, slow) for n in RANKS)
                rows.append([f"{spread:.0%}", slow, *cells])
        table(["spread", "slowest rank x", *of_ranks], rows)


if __name__ == "__main__":
    main()
