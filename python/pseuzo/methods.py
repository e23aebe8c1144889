"""The methods by name, and what a step of each costs. Imports nothing: the command line lists them before it works."""

METHODS = ("pseuzo", "mezo", "mezo-momentum", "fo-sgd", "fo-adam")


def forwards_per_step(method: str, directions: int = 1, two_sided: bool | None = None) -> int:
    """Forward passes a step; a backward pass counts as two of them. two_sided None: as is usual for the method."""
    if method.startswith("fo-"):
        return 3
    if method == "pseuzo":
        return 3 if two_sided else 2
    return 1 + directions if two_sided is False else 2 * directions
