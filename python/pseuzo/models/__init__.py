"""What a model needs before it is trained: loading, tuning modes, an objective, a placement of
noise."""

from pseuzo.extras import how_to_install, outdated

if old := outdated():
    raise ImportError(how_to_install("pseuzo.models", old))
