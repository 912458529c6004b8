"""The project's errors. Each has a problem, with the value and the limit, and separately a fix."""

from typing import NamedTuple


def sentence(problem: str, fix: str) -> str:
    """Return the problem and its fix as one text: on one line, or with the fix below a problem of several lines."""
    return problem + ("\n" if "\n" in problem else "; ") + fix if fix else problem


class LimiError(Exception):
    """Base of every error that a user can fix. `launch/limi.py` prints it without a traceback and exits with status 2.

    problem: what is wrong, with the value and the limit. fix: the exact override or command that fixes it; empty if there is
    none. Both survive pickling, so an error from a worker or a Ray actor reaches the user unchanged.
    """

    def __init__(self, problem: str, fix: str = "") -> None:
        super().__init__(problem, fix)
        self.problem, self.fix = problem, fix

    def __str__(self) -> str:
        return sentence(self.problem, self.fix)


class ConfigError(LimiError):
    """The recipe is wrong: a name, a type, a value, or a layout that cannot run."""


class DataError(LimiError):
    """The trajectories are wrong, or the check of their exact text fails."""


class PreflightError(LimiError):
    """The machine cannot run the recipe now: a port is in use, the disk is full, a file is missing."""


class CheckpointError(LimiError):
    """A checkpoint cannot be written or read, or does not fit the recipe."""


class TrainError(LimiError):
    """Training ended early: a rank died or hung, or a value is no longer finite."""


class NodeLostError(TrainError):
    """The cluster lost nodes, and they did not come back in time. The run stands at its last checkpoint."""


class DivergedError(TrainError):
    """A step's loss or gradient is not finite, or the loss jumped. problem: the step's figures and what is wrong with them."""


class SanityError(LimiError):
    """The trained checkpoint cannot be served, or a check on it failed."""


class Fault(NamedTuple):
    """One problem and its fix, for checks that may find several. `LimiError(*fault)` makes an error of it."""

    problem: str
    fix: str = ""

    def __str__(self) -> str:
        return sentence(self.problem, self.fix)
