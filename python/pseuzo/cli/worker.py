"""The processes of a comparison, and what one run does in them.

A worker is a process that makes one run after another and sends back their figures. On a CPU it is
forked from a server that has imported everything and computed nothing, so that it starts at once.
Trials share a worker, with its rows and its tokenizer; each loads the model anew, as a process of
its own would, so its bits are those of a process of its own. A final run has a worker to itself,
since only then are the peak of its resident memory and its time its own.
"""

import contextlib
import gc
import math
import multiprocessing
import os
import shutil
import threading
import time
import traceback
from collections.abc import Collection, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from pseuzo.sentences import one_line
from pseuzo.train.methods import forwards_of_steps, forwards_per_step, methods_with
from pseuzo.train.options import OPTIONS

EVALUATIONS = 12  # about how many a final run makes
DIVERGED = 4.0  # a run has that ends with a loss above so many times its first
# What decides whether a run can use the rows and the tokenizer of the last one.
SHARED = (
    *("task", "data", "train_size", "dev_size", "test_size", "data_seed", "chat", "max_length"),
    *("train_on", "model", "model_kind", "mode", "dtype", "device", "offload"),
)


class Workers:
    """Executes runs: trials and calibrations in a process that they share, final runs each in one
    of their own. folder: for the log, and for what runs keep while they go on. devices: those of
    the runs."""

    def __init__(self, folder: Path, devices: Collection[str]):
        self.folder = folder
        # What imports may ask of CUDA does not survive a fork.
        forks = set(devices) <= {"cpu"} and "forkserver" in multiprocessing.get_all_start_methods()
        self._context = multiprocessing.get_context("forkserver" if forks else "spawn")
        if forks:
            self._context.set_forkserver_preload(["pseuzo.cli.run"])
        self._shared: _Worker | None = None

    def __call__(self, kind: str, settings: dict[str, Any], budget: int) -> dict[str, Any]:
        if kind == "final":
            self.close()  # its memory is the run's
            worker = _Worker(self._context, self.folder)
            figures = worker.make(kind, settings, budget)
            worker.close()
            return figures
        if self._shared is None or not self._shared.alive():
            self._shared = _Worker(self._context, self.folder)
        return self._shared.make(kind, settings, budget)

    def close(self) -> None:
        if self._shared is not None:
            self._shared.close()
            self._shared = None


class _Worker:
    def __init__(self, context: Any, folder: Path):
        self._requests, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, folder, dict(os.environ)))
        self._process.start()
        theirs.close()

    def make(self, kind: str, settings: dict[str, Any], budget: int) -> dict[str, Any]:
        try:
            self._requests.send((kind, settings, budget))
            return self._requests.recv()
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode
            return {"status": "failed", "reason": f"its process ended with code {code}"}
        except BaseException:  # interrupted: nobody waits for the figures
            self._process.terminate()
            raise

    def alive(self) -> bool:
        return self._process.is_alive()

    def close(self) -> None:
        self._requests.close()
        self._process.join()


def serve(requests: Connection, folder: Path, environment: dict[str, str]) -> None:
    """Make runs until the other end closes; end at once if its process does."""
    os.environ.update(environment)
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker is started by a comparison"

    def end_with_parent() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    import torch

    import pseuzo.cli.run  # noqa: F401

    gc.freeze()  # each run collects garbage, and need not look for it in what was imported
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or torch.get_num_threads()))
    make = Maker(folder / "work")
    with open(folder / "runs.log", "a") as log, _into(log.fileno()):
        while True:
            try:
                kind, settings, budget = requests.recv()
            except (EOFError, KeyboardInterrupt):
                return
            try:
                requests.send(make(kind, settings, budget))
            except KeyboardInterrupt:
                return


@contextlib.contextmanager
def _into(file: int) -> Iterator[None]:
    """Write what this process prints into a file."""
    os.dup2(file, 1)
    os.dup2(file, 2)
    yield


class Maker:
    """Makes runs in this process. folder: what a run keeps there is removed after it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._run: Any = None
        self._loaded: dict[str, Any] = {}
        self._before: dict[int, float] = {}  # the dev loss of the model as loaded, by seed

    def __call__(self, kind: str, settings: dict[str, Any], budget: int) -> dict[str, Any]:
        """Return the figures of a run, as the ledger keeps them. status is done, diverged (the loss
        is not finite any more) or failed, and reason says why."""
        print(f"{kind}, {settings['method']}, lr {settings.get('lr')}", flush=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        try:
            return self._made(kind, settings, budget)
        except Exception as error:
            traceback.print_exc()
            return {"status": "failed", "reason": one_line(error)[:500]}
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _made(self, kind: str, settings: dict[str, Any], budget: int) -> dict[str, Any]:
        from pseuzo.cli.commands import train_defaults
        from pseuzo.cli.run import resolve

        own = {"output": self.folder, "eval_every": 0, "save_every": 0, "keep": "last"}
        own |= {"quiet": True, "resume": None, "journal": None, "steps": 1}
        given = train_defaults() | settings | own
        run = self._of(resolve(given))
        if kind == "calibration":
            return _calibrated(run, self.folder)
        return _trained(run, self.folder, budget, self._before, final=kind == "final")

    def _of(self, c: dict[str, Any]) -> Any:
        """Return the Run of these settings, with the rows of the last one if they are the same."""
        from pseuzo.cli.options import MODE_OPTIONS
        from pseuzo.cli.run import Run
        from pseuzo.optim.together import Together

        shared = {name: c[name] for name in (*SHARED, *MODE_OPTIONS)}
        if shared != self._loaded:
            self._run, self._loaded, self._before = Run(c, Together()), shared, {}
        self._run.c = c
        return self._run


def _calibrated(run: Any, folder: Path) -> dict[str, Any]:
    """Measure the curvature of the loss along the noise, and scale eps to it."""
    found = run.trainer(run.model(), folder, scale_lr=False).calibrate()
    eps = found["eps"] if run.c["method"] in methods_with("eps") else None
    kept = {"curvature": found["curvature"], "eps": eps, "forwards": found["probed"]}
    return {"status": "done"} | kept | _circumstances(run)


def _trained(
    run: Any, folder: Path, budget: int, before: dict[int, float], final: bool
) -> dict[str, Any]:
    """Train for as many steps as the budget has passes for, those of its own search included.
    before: the dev losses of the model as loaded, by seed, to which that of a trial is added."""
    from pseuzo.machine import peak_memory, reset_peak
    from pseuzo.tasks import evaluate

    c, model = run.c, run.model()
    c["train_size"] = len(run.examples["train"])  # there may be fewer than were asked for
    if not final and c["seed"] not in before:
        dev = evaluate(model, run.data["dev"], batch_size=c["eval_batch_size"])
        before[c["seed"]] = dev["loss"]
    started = time.perf_counter()
    trainer = _of_length(run, model, folder, budget, EVALUATIONS if final else 0)
    seconds = time.perf_counter() - started if trainer.search_forwards else 0.0
    reset_peak(c["device"])
    outcome = trainer.train()
    history, metric = trainer.state.log_history, run.task.metric
    steps = outcome.global_step
    if final:
        if not any(row["step"] == steps for row in history if "eval_loss" in row):
            trainer.evaluate()
        peak = peak_memory(c["device"])
        dev = _dev(history)
    else:
        peak = peak_memory(c["device"])
        dev = evaluate(model, run.data["dev"], batch_size=c["eval_batch_size"])
    trained = max((row.get("train_seconds") or 0.0 for row in history), default=0.0)
    figures = {
        "status": "done",
        "lr": trainer.optimizer.defaults["lr"],
        "eps": trainer.zero_order.eps if c["method"] in methods_with("eps") else None,
        "steps": steps,
        "forwards": trainer.forwards(steps),
        "search_forwards": trainer.search_forwards,
        "judge_forwards": 0 if final else math.ceil(len(run.data["dev"]) / c["batch_size"]),
        "metric": metric,
        "evaluations": _evaluations(history, metric, seconds),
        "dev": dev,
        "skipped_steps": trainer.zero_order.skipped_steps if trainer.zero_order else 0,
        "train_seconds": trained + seconds,
        "search_seconds": seconds,
        "peak_memory_mib": peak,
    } | _circumstances(run)
    if final:
        test = evaluate(model, run.data["test"], batch_size=c["eval_batch_size"], outcomes=True)
        # Most are 0 or 1, and take less room without a decimal point.
        outcomes = [int(x) if x in (0, 1) else round(x, 6) for x in test.pop("outcomes")]
        figures |= {"outcomes": outcomes, "test": test}
    first = next((row["eval_loss"] for row in history if "eval_loss" in row), math.inf)
    start = first if final else before[c["seed"]]
    if c["objective"] != "loss" or not start > 0:  # such as a loss of one's own
        start = math.inf
    if not (math.isfinite(dev["loss"]) and dev["loss"] <= DIVERGED * start):
        reason = f"the dev loss is {dev['loss']:.4g}, and the loss was {start:.4g} at first"
        figures |= {"status": "diverged", "reason": reason}
    return figures


def _of_length(run: Any, model: Any, folder: Path, forwards: int, evaluations: int) -> Any:
    """Return the trainer of as many steps as these passes are enough for. What it searched for is
    in the folder. Some steps of a schedule take less than others, and the optimizer has to say how
    many of them there are."""
    c = run.c

    def of(steps: int, planned: int) -> Any:
        c["steps"], c["log_every"] = steps, max(1, planned // 100)
        c["eval_every"] = max(1, math.ceil(planned / evaluations)) if evaluations else 0
        trainer = run.trainer(model, folder)
        trainer.create_optimizer()
        return trainer

    steps = _steps(c, forwards)
    trainer, most = of(steps, steps), math.ceil(forwards_per_step(c["method"], _counted(c)))
    if trainer.search_forwards or trainer.still:
        return of(steps, trainer.planned_steps())  # the search left fewer, or more at rate 0
    while (more := int(forwards - trainer.forwards(steps)) // most) > 0:
        longer = of(steps + more, steps + more)
        if longer.forwards(steps + more) > forwards:
            return of(steps, steps)
        trainer, steps = longer, steps + more
    return trainer


def _counted(c: dict[str, Any]) -> dict[str, Any]:
    return {name: c[name] for name in (*OPTIONS, "train_size", "batch_size", "lr") if name in c}


def _steps(c: dict[str, Any], forwards: int) -> int:
    """Return the largest number of steps with at most so many passes. ValueError if there is
    none."""
    options = _counted(c)
    steps = int(forwards / forwards_per_step(c["method"], options)) + 1
    while steps > 0 and forwards_of_steps(c["method"], steps, options) > forwards:
        steps -= 1
    if steps < 1:
        raise ValueError(f"{forwards} forward passes are left, too few for a step; give more")
    return steps


def _evaluations(history: list[dict[str, Any]], metric: str, seconds: float) -> list[list]:
    """Return [step, forwards, seconds, loss, metric] of each evaluation."""
    return [
        [
            row["step"],
            row["forwards"],
            row["train_seconds"] + seconds,
            row["eval_loss"],
            row[f"eval_{metric}"],
        ]
        for row in history
        if "eval_loss" in row
    ]


def _dev(history: list[dict[str, Any]]) -> dict[str, float]:
    last = [row for row in history if "eval_loss" in row][-1]
    left_out = ("eval_runtime",)
    return {
        name.removeprefix("eval_"): value
        for name, value in last.items()
        if name.startswith("eval_") and name not in left_out
    }


def _circumstances(run: Any) -> dict[str, Any]:
    import torch
    import transformers

    from pseuzo.machine import hardware

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"hardware": hardware(run.c["device"]), "versions": versions}
