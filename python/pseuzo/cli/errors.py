"""What the command line says when something cannot be done: one sentence, and an exit code.

2: what was asked for cannot be done. 130: interrupted. 1: a bug, with its traceback.
"""

import errno
import functools
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import click

from pseuzo.launch import is_first_of_machine, launched, rank
from pseuzo.sentences import one_line

FULL = (  # texts of errors of writing: the system's, which safetensors repeats, and torch's
    *(os.strerror(number) for number in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)),
    "PytorchStreamWriter failed writing",
    "iostream error",
)


class Failure(click.ClickException):
    """One sentence and exit code 2."""

    exit_code = 2

    def __init__(self, sentence: str):  # the sentence may quote a file of any size
        super().__init__(
            sentence if len(sentence) <= 2000 else f"{sentence[:1500]} ... {sentence[-400:]}"
        )


def plainly(command: Callable, interrupted: str = "interrupted") -> Callable:
    """Turn a refusal into one sentence and exit code 2, and an interrupt into exit code 130.
    PSEUZO_DEBUG=1 shows the traceback of a refusal."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except (Exception, KeyboardInterrupt) as error:
            if _told_by_another(error):
                raise SystemExit(130 if _was_interruption(error) else 2) from None
            if _was_interruption(error):
                click.echo(interrupted, err=True)
                raise SystemExit(130) from None
            sentence = None if os.environ.get("PSEUZO_DEBUG") else _sentence(error)
            if sentence is None:
                raise
            raise Failure(f"rank {rank()}: {sentence}" if rank() else sentence) from None

    return run


def _told_by_another(error: BaseException) -> bool:
    """Return whether another of the launched processes says what happened.

    Until they are connected, the first one on each machine speaks. After that rank 0 speaks, unless
    one rank alone failed. torchrun says which process ended first.
    """
    if launched() == 1:
        return False
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_initialized():
        return not is_first_of_machine()
    kind = type(error).__name__
    if kind == "RefusedElsewhere" or (kind == "RankFailed" and "cannot be heard" not in str(error)):
        return True
    interrupted = _was_interruption(error)
    return rank() > 0 and (
        interrupted or kind in ("RanksDiffer", "RankFailed") or _lost_others(error)
    )


def _lost_others(error: BaseException) -> bool:
    """Return whether the error came from a connection to another rank."""
    at = error.__traceback__
    while at is not None:
        if at.tb_frame.f_globals.get("__name__", "").startswith("torch.distributed."):
            return isinstance(error, RuntimeError)
        at = at.tb_next
    return False


def _was_interruption(error: BaseException | None) -> bool:
    """Return whether the error is an interrupt or was caused by one: Transformers turns a Ctrl-C
    during its imports into an ImportError."""
    return any(isinstance(e, KeyboardInterrupt) for e in _chain(error))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the error, then its cause, then the cause of that, and so on."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or error.__context__


def _sentence(error: BaseException) -> str | None:
    """Return the sentence for an error that the user can fix; None for a bug, and for click's own
    errors."""
    import yaml
    from safetensors import SafetensorError

    text = one_line(error)
    has = {p.name for p in click.get_current_context().command.params}
    if full := next(
        (str(e) for e in _chain(error) if any(words in str(e) for words in FULL)), None
    ):
        then = "; then --resume continues the run" if "resume" in has else ""
        full = " ".join(full.split())
        return f"the disk is full, or a limit on files was hit ({full}): make room{then}"
    memory = ("out of memory", "can't allocate memory", "not enough memory")
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(m in text.lower() for m in memory)
    ):
        savings = {
            "batch_size": "a smaller --batch-size",
            "eval_batch_size": "a smaller --eval-batch-size",
            "max_length": "a smaller --max-length",
            "dtype": "a 16-bit --dtype",
        }
        ways = [way for name, way in savings.items() if name in has] or ["a smaller model"]
        return f"out of memory: try {listed(ways, 'or')}"
    if isinstance(error, yaml.YAMLError):
        return f"not YAML: {text}"
    if isinstance(error, SafetensorError):
        return f"a safetensors file is damaged: {text}"
    # These modules read the files of runs.
    if isinstance(error, LookupError) and _module(error) in (
        "pseuzo.compare.plots",
        "pseuzo.compare.report",
        "pseuzo.cli.plots",
    ):
        what = repr(error.args[0]) if isinstance(error, KeyError) else "an evaluation"
        return (
            f"{what} is missing in the results of a run (PSEUZO_DEBUG=1 shows where); run it again"
        )
    if type(error).__name__ == "RankFailed" or (launched() > 1 and _lost_others(error)):
        # Without the lines of source and the addresses that gloo gives.
        how = re.sub(r"\[[^]]*\]:? *", "", text).partition(". This is typically")[0]
        return f"another rank was lost ({how}); --resume continues the run"
    if isinstance(error, RuntimeError) and _module(error).startswith("pseuzo"):
        return text
    return text if isinstance(error, (ValueError, TypeError, OSError, ImportError)) else None


def _module(error: BaseException) -> str:
    """Return the module that raised the error; where an op raised it, the module that called the
    op."""
    at, found = error.__traceback__, ""
    while at is not None:
        name = at.tb_frame.f_globals.get("__name__", "")
        found = found if name == "torch._ops" else name
        at = at.tb_next
    return found


def listed(words: list[str] | tuple[str, ...], last: str = "and") -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"
