"""Rewards from the utilities of prefixes, without what they know from the prompt's own request.

The utilities are those of `orchard.feedback.utilities`: mean rewards of what was shown, or shares
of the training rows.

Shapes:  B prompts   C candidates   L codes of the longest item
"""

import numpy as np
from jaxtyping import Float32

from orchard.errors import DataError
from orchard.types import SearchTrees
from rewards.context import RewardContext


def utility(trees: SearchTrees, ctx: RewardContext) -> Float32[np.ndarray, " C"]:
    """Return the utility of each candidate, less that of the root.

    With `rewards.utility.floor` it is that of the logarithm.
    """
    return step_utilities(trees, ctx).astype(np.float64).sum(1).astype(np.float32)


def step_utilities(trees: SearchTrees, ctx: RewardContext) -> Float32[np.ndarray, "C L"]:
    """Return what each code of a candidate adds to the utility of the prefix before it (HRPO).

    Codes without an alternative, and those past the end, add 0.

    Raises:
        DataError: the logarithm of a utility that is not positive is asked for.
    """
    value = ctx.prefix_utilities.of(trees)
    floor = ctx.settings.utility.floor
    if floor:
        if not (value > -floor).all():
            raise DataError(
                f"a utility is {value.min():g}, so that log({floor:g} + it) is not defined; set "
                "rewards.utility.floor = 0 where feedback has negative rewards"
            )
        value = np.log(floor + value)
    return np.diff(value, axis=1).astype(np.float32)
