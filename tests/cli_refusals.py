"""Helpers for tests of refusals by the command line."""

from pathlib import Path

from helpers import pseuzo

BASE = ["--model", "demo", "--task", "demo"]


EXAMPLES = Path(__file__).parents[1] / "examples"


def refused(*args: object) -> str:
    """Run a command that must be refused, and return its one sentence."""
    text = pseuzo(*args, code=2)
    assert "Traceback" not in text
    *_, last = text.strip().splitlines()
    assert last.startswith("Error: ")
    return last.removeprefix("Error: ")


def raising(error: BaseException):
    def run(*args, **kwargs):
        raise error

    return run
