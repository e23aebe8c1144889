"""The methods and their choices by name, and what a step of each costs. Imports nothing: the command line lists them
before it works."""

ZEROTH_ORDER = ("pseuzo", "mezo", "mezo-momentum")
METHODS = (*ZEROTH_ORDER, "fo-sgd", "fo-adam")
MODES = ("full", "lora", "prefix", "head")
SCHEDULES = ("constant", "linear", "cyclic-hyperbola")
GROUPS = ("label", "row", "none")
HEADS = ("frozen", "exact")
OBJECTIVES = ("loss", "metric")


def forwards_per_step(method: str, directions: int = 1, two_sided: bool | None = None) -> int:
    """Forward passes a step; a backward pass counts as two of them. two_sided None: as is usual for the method."""
    if method not in ZEROTH_ORDER:
        return 3
    if method == "pseuzo":
        return 3 if two_sided else 2
    return 1 + directions if two_sided is False else 2 * directions
