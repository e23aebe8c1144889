"""Makes the schedule of lambda from the options of a run."""

from pseuzo.optim.schedule import (
    Constant,
    Cycles,
    CyclicHyperbola,
    Linear,
    Reciprocal,
    Schedule,
)
from pseuzo.train.builders import Setup


def schedule_of(setup: Setup) -> Schedule:
    """Make the schedule that the options ask for. ValueError if its cycles do not fit the run."""
    args, momentum = setup.args, setup.args.momentum
    assert momentum is not None  # the arguments fill in the method's default
    given = {"cycles": args.cycles, "pseuzo_epochs": args.pseuzo_epochs}
    in_cycles = {name: value for name, value in given.items() if value is not None}
    if args.schedule == "constant" and not in_cycles:
        return Constant(momentum)
    steps = setup.planned_steps()
    if args.schedule == "linear" and not in_cycles:
        return Linear(momentum, 0.0, steps)
    epoch = setup.steps_per_epoch()
    if args.schedule == "cyclic-hyperbola":
        return CyclicHyperbola.from_steps(steps, epoch, **in_cycles)
    if args.schedule == "reciprocal" and not in_cycles:
        return Reciprocal(momentum, epoch)
    makes = {
        "constant": lambda active: Constant(momentum),
        "linear": lambda active: Linear(momentum, 0.0, active),
        "reciprocal": lambda active: Reciprocal(momentum, epoch),
    }
    return Cycles.from_steps(makes[args.schedule], steps, epoch, **in_cycles)
