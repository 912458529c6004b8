"""A stop between two steps of slime: its own loop saves after the current step, and then ends.

slime's script asks `should_run_periodic_action` after every step, first whether to save, then whether to evaluate. This module answers
the first question with yes once a stop is requested, and ends the script at the second.
"""

from pathlib import Path

REQUEST = "stop"  # file in the run folder; a stop is requested while it exists
STATUS = 75  # exit status of a driver that stopped on request (EX_TEMPFAIL in sysexits.h)


def install(run: Path) -> None:
    """Make slime's script in this process stop once `REQUEST` exists in the run folder. Call this before the script starts."""
    from slime.utils import misc

    slimes_answer, stopping = misc.should_run_periodic_action, False

    def should_run(
        rollout_id: int, interval: int | None, num_rollout_per_epoch: int | None = None, num_rollout: int | None = None
    ) -> bool:
        nonlocal stopping
        due = slimes_answer(rollout_id, interval, num_rollout_per_epoch, num_rollout)
        asks_whether_to_save = num_rollout is not None
        if not asks_whether_to_save:
            if stopping:
                raise SystemExit(STATUS)
            return due
        last = rollout_id + 1 == num_rollout
        stopping = not last and (run / REQUEST).exists()
        return due or (stopping and interval is not None)

    misc.should_run_periodic_action = should_run
