"""Recipes: settings of `pseuzo train` that go together, by name.

`--recipe best` takes these for every option that is not given. The results of the comparisons
decide what is in it: see docs/results.md. This module imports neither torch nor Transformers.
"""

from typing import Any

RECIPES: dict[str, dict[str, Any]] = {
    "best": {
        "method": "mezo",
        "readout": "auto",
        "noise_on": ["attention-out"],
        "lr": "auto",
    },
}
