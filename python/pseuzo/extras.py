"""The packages that `pip install "pseuzo[train]"` adds, and the error for when they are missing."""

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

TRAIN_MODULES = (  # the import names of the packages of the extra `train` in pyproject.toml
    "accelerate",
    "click",
    "datasets",
    "jinja2",
    "matplotlib",
    "peft",
    "rich",
    "safetensors",
    "tokenizers",
    "torchmetrics",
    "tqdm",
    "transformers",
    "yaml",
)


OLDEST_TRANSFORMERS = (5, 4)  # as in pyproject.toml


def missing_train_modules() -> list[str]:
    """List the modules of the extra that are not installed, without importing any."""
    return [name for name in TRAIN_MODULES if find_spec(name) is None] + outdated()


def outdated() -> list[str]:
    """Return what is needed in place of a Transformers that is too old, such as one that another
    library pins; nothing if it is new enough or missing."""
    try:
        installed = version("transformers")
        if tuple(map(int, installed.split(".")[:2])) >= OLDEST_TRANSFORMERS:
            return []
    except (PackageNotFoundError, ValueError):  # missing, or numbered by a rule of its own
        return []
    return [f"transformers>={'.'.join(map(str, OLDEST_TRANSFORMERS))} (not {installed})"]


def how_to_install(what: str, missing: list[str]) -> str:
    """Return one sentence for a user who asked for `what` without the extra."""
    are = "is" if len(missing) == 1 else "are"
    return (
        f'{what} needs {", ".join(missing)}, which {are} not installed: pip install "pseuzo[train]"'
    )
