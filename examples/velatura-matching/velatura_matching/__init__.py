"""An objective and a sampler of timesteps from two papers."""

from velatura.api import hookimpl


@hookimpl
def velatura_objective():
    """Imported when a recipe names it."""
    return ["ram = velatura_matching.ram:RAM"]


@hookimpl
def velatura_timesteps():
    """Imported when a recipe names it."""
    return ["mode = velatura_matching.mode:Mode"]
