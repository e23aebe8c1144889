"""Kills, stops, adds and loses ranks of small runs, and checks that each run ends as one that
nothing happened to.

    python bench/elastic.py

Each run trains the demo model under torchrun's agent, without a checkpoint of the weights, and is
started again with the same command after each loss. A line is printed for each: how many ranks it
had, what happened to them, how often the ranks were started, whether the journal has each step
once, whether it gives the weights of model/ when it is replayed on the base, and whether its
records are those of a run with which nothing happened. Exit code 1 if one is not so.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import torch
from agents import LIMIT, Job, end, lose, wait
from pseuzo.cli.run import model_path
from pseuzo.models.loading import load_model
from pseuzo.train.journal_file import owner, read_journal
from pseuzo.train.replay import replay
from safetensors.torch import load_file
from slow_network import slow_network, why_not

RUN = (
    "train --model demo --task demo --device cpu --quiet --method pseuzo --window 4 --lr 2e-4 "
    "--train-size 96 --dev-size 24 --test-size 24 --eval-batch-size 24 --batch-size 24 "
    "--eval-every 0 --log-every 1 --save-every 0 --keep last --resume"
).split()


class Trial:
    """A run in a folder of its own."""

    def __init__(self, args, name: str, **job):
        self.args, self.name, self.began = args, name, time.monotonic()
        self.folder = Path(args.folder or tempfile.gettempdir()) / f"elastic-{os.getpid()}-{name}"
        self.journal, self.output = self.folder / "run.pzj", self.folder / "run"
        places = ["--output", str(self.output), "--journal", str(self.journal)]
        self.folder.mkdir(parents=True)
        argv = [*RUN, *places, "--steps", str(args.steps), *job.pop("more", ())]
        self.job = Job(self.folder, argv, **job)
        self.starts, self.most, self.happened = 0, 0, ""
        self.agents: list = []

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        end(self.agents)
        if error[0] is None and not self.args.keep:
            shutil.rmtree(self.folder)
        elif error[0] is not None:
            print(f"{self.name}: see {self.folder}", file=sys.stderr)

    def recorded(self) -> int:
        """The steps in the journal, of which there are never fewer than before."""
        steps = owner(self.journal)[1]
        if steps < self.most:
            raise RuntimeError(f"the journal had {self.most} steps, and now has {steps}")
        self.most = steps
        return steps

    def wait_for_ranks(self, world: int, besides: set[int] = frozenset()) -> dict[int, int]:
        """Wait until all ranks of a new start run; return their processes."""

        def are_there() -> bool:
            found = self.job.ranks()
            pids = {pid for pid, size in found.values() if size == world}
            return set(range(world)) <= found.keys() and len(pids) == world and not pids & besides

        wait(are_there, self.agents[:1], f"{world} ranks run")
        self.starts += 1
        return {rank: pid for rank, (pid, _) in self.job.ranks().items() if rank < world}

    def wait_for_step(self, step: int) -> None:
        wait(lambda: self.recorded() >= step, self.agents[:1], f"step {step} is recorded")

    def finish(self, ranks: str, usual: "Trial | None", bits: bool = True) -> bool:
        """Wait for the end, and print the line of this run."""
        for agent in self.agents:
            agent.join(LIMIT)
        if self.agents[0].exitcode:
            raise RuntimeError(f"the run did not end well; see {self.folder}/agents.log")
        seconds = time.monotonic() - self.began
        context = get_context("fork")
        answers = context.SimpleQueue()
        judge = context.Process(target=self._judge, args=(answers, usual and usual.journal))
        judge.start()
        once, weights, same, apart = answers.get()
        judge.join()
        alike = "" if usual is None else "yes" if same else f"no ({apart:.0e})"
        row = self.name, ranks, self.happened, self.starts, yes(once), yes(weights), alike
        print(LINE.format(*row, f"{seconds:.0f}"), flush=True)
        return once and weights and (same or not bits)

    def _judge(self, answers, usual: Path | None) -> None:
        torch.set_num_threads(1)
        steps = [record.step for record in read_journal(self.journal)[1]]
        model = load_model(model_path("demo"))[0]
        replay(self.journal, model)
        names = dict(model.named_parameters())
        saved = load_file(self.output / "model" / "model.safetensors")
        weights = all(torch.equal(saved[n], names[n]) for n in saved if n in names)
        same, apart = True, 0.0
        if usual is not None:
            same = records(self.journal) == records(usual)
            other = load_model(model_path("demo"))[0]
            replay(usual, other)
            pairs = zip(model.parameters(), other.parameters(), strict=True)
            apart = max(float((p.detach() - q.detach()).abs().max()) for p, q in pairs)
        answers.put((steps == list(range(self.args.steps)), weights, same, apart))


LINE = "{:10} {:>6}  {:52} {:>6} {:>10} {:>7} {:>14} {:>8}"


def yes(value: bool) -> str:
    return "yes" if value else "NO"


def records(journal: Path) -> bytes:
    """All but the header, which has the identifier of its run."""
    content = journal.read_bytes()
    return content[8 + 12 + int.from_bytes(content[8:12], "little") :]


def usual(args) -> Trial:
    """A run that nothing happens to."""
    trial = Trial(args, "undisturbed")
    trial.agents.append(trial.job.agent(args.ranks))
    trial.wait_for_ranks(args.ranks)
    trial.happened = "nothing"
    return trial


def kills(args, rest: Trial) -> bool:
    """SIGKILL of a random rank at random moments: as the ranks start, and between steps."""
    draw = random.Random(args.seed)
    moments = sorted(draw.randrange(args.steps * 9 // 10) for _ in range(args.kills))
    with Trial(args, "kills", restarts=args.kills) as trial:
        trial.agents.append(trial.job.agent(args.ranks))
        dead: set[int] = set()
        for moment in moments:
            pids = trial.wait_for_ranks(args.ranks, dead)
            if draw.random() < 0.75:
                trial.wait_for_step(moment)
            time.sleep(draw.random() * args.jitter)
            rank = draw.randrange(args.ranks)
            os.kill(pids[rank], signal.SIGKILL)
            dead |= set(pids.values())
        trial.wait_for_ranks(args.ranks, dead)
        trial.happened = f"SIGKILL of a rank, {args.kills} times"
        return trial.finish(str(args.ranks), rest)


def stop(args, rest: Trial) -> bool:
    """SIGSTOP of a rank, for longer than the others wait."""
    with Trial(args, "stop", restarts=1, more=["--ddp-timeout", str(args.timeout)]) as trial:
        trial.agents.append(trial.job.agent(args.ranks))
        pids = trial.wait_for_ranks(args.ranks)
        trial.wait_for_step(args.steps // 3)
        os.kill(pids[args.ranks - 1], signal.SIGSTOP)
        trial.wait_for_ranks(args.ranks, set(pids.values()))
        trial.happened = f"SIGSTOP of a rank; the others wait {args.timeout} s"
        return trial.finish(str(args.ranks), rest)


def nodes(args, rest: Trial) -> bool:
    """--nnodes=1:4 with 2 ranks each: a machine joins, another joins, and one is lost."""
    with Trial(args, "nodes", nodes=(1, 4), restarts=4) as trial:
        trial.agents.append(trial.job.agent(2))
        trial.wait_for_ranks(2)
        trial.wait_for_step(args.steps // 20)
        trial.agents.append(trial.job.agent(2))
        trial.wait_for_ranks(4)
        trial.wait_for_step(args.steps // 3)
        trial.agents.append(trial.job.agent(2))
        before = trial.wait_for_ranks(6)
        trial.wait_for_step(2 * args.steps // 3)
        lose(trial.agents.pop())
        trial.wait_for_ranks(4, set(before.values()))
        trial.happened = "--nnodes=1:4: two machines join, one is lost"
        return trial.finish("2-6", rest, bits=False)


def network(args, rest: Trial) -> bool:
    """Two machines with a slow link that loses frames, and SIGKILL of the second rank."""
    if reason := why_not():
        print(f"network: left out, as {reason}")
        return True
    delay, loss = args.delay / 1000, args.loss / 100
    with slow_network(delay, loss, args.seed) as (one, other, link):
        with Trial(args, "network", nodes=(2, 2), restarts=1, host=one.address) as trial:
            trial.agents += [trial.job.agent(1, e.name, e.address) for e in (one, other)]
            pids = trial.wait_for_ranks(2)
            trial.wait_for_step(args.steps // 2)
            os.kill(pids[1], signal.SIGKILL)
            trial.wait_for_ranks(2, set(pids.values()))
            trial.happened = f"{args.delay:g} ms each way, {args.loss:g} % of frames lost; SIGKILL"
            done = trial.finish("2", rest, bits=False)
            print(f"           {link.copied} frames were copied, {link.dropped} lost")
            return done


SCENARIOS = {"kills": kills, "stop": stop, "nodes": nodes, "network": network}


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    p.add_argument("--only", choices=SCENARIOS, action="append")
    p.add_argument("--ranks", type=int, default=8)
    p.add_argument("--steps", type=int, default=200)
    p.add_argument("--kills", type=int, default=20)
    p.add_argument("--seed", type=int, default=1, help="of the ranks and moments")
    p.add_argument("--jitter", type=float, default=0.5, help="seconds that a kill waits, at most")
    p.add_argument("--timeout", type=int, default=15, help="seconds that a rank waits for another")
    p.add_argument("--delay", type=float, default=20, help="ms, in each direction")
    p.add_argument("--loss", type=float, default=1, help="percent of the frames")
    p.add_argument("--folder", help="for the runs; by default that of temporary files")
    p.add_argument("--keep", action="store_true", help="do not remove the runs")
    args = p.parse_args()
    print(LINE.format("", "ranks", "", "starts", "each once", "replay", "undisturbed", "seconds"))
    good = []
    with usual(args) as rest:
        good.append(rest.finish(str(args.ranks), None))
        good += [SCENARIOS[name](args, rest) for name in args.only or SCENARIOS]
    return 0 if all(good) else 1


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
