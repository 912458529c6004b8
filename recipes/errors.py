"""The project's named errors. A message gives the value, the limit and what to type instead."""


class LimiError(Exception):
    """Base of every error a user can mend; `launch/limi.py` prints it without a traceback and exits 2."""


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
    """A step's loss or gradient is not finite, or the loss leapt; nothing was updated."""

    def __init__(self, figures: str, why: str) -> None:
        super().__init__(figures, why)
        self.figures, self.why = figures, why

    def __str__(self) -> str:
        return f"{self.figures}, {self.why}"


class SanityError(LimiError):
    """The trained checkpoint cannot be served, or a check on it failed."""
