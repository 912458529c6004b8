"""The project's named errors: what is wrong, with value and limit, and apart from it what fixes it."""

from typing import NamedTuple


def sentence(problem: str, fix: str) -> str:
    """Both together, as a user reads them: on one line, or the fix below a problem of several lines."""
    return problem + ("\n" if "\n" in problem else "; ") + fix if fix else problem


class LimiError(Exception):
    """Base of every error a user can fix; `launch/limi.py` prints it without a traceback and exits 2.

    problem: what is wrong, with the value and the limit. fix: the exact override or command that fixes it, empty where nothing
    that can be typed does. Both survive pickling, so that an error reaches the user from a worker or a Ray actor as it was raised.
    """

    def __init__(self, problem: str, fix: str = "") -> None:
        super().__init__(problem, fix)
        self.problem, self.fix = problem, fix

    def __str__(self) -> str:
        return sentence(self.problem, self.fix)


class ConfigError(LimiError):
    """The recipe is wrong: a name, a type, a value, or a layout that cannot run."""


class DataError(LimiError):
    """The trajectories are wrong, or their exact text cannot be proved."""


class PreflightError(LimiError):
    """The machine cannot run the recipe as it stands: a port in use, no room on the disk, a missing file."""


class CheckpointError(LimiError):
    """A checkpoint cannot be written, read, or does not fit the recipe."""


class TrainError(LimiError):
    """Training ended early: a rank died or hung, or a number stopped being finite."""


class DivergedError(TrainError):
    """A step's loss or gradient is not finite, or the loss leapt. problem: the step's figures and what is wrong with them."""


class SanityError(LimiError):
    """The trained checkpoint cannot be served, or a check on it failed."""


class Fault(NamedTuple):
    """What is wrong and what fixes it, where more than one thing may be: a `LimiError` takes `*fault`."""

    problem: str
    fix: str = ""

    def __str__(self) -> str:
        return sentence(self.problem, self.fix)
