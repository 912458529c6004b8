"""Lines of progress where the output is no terminal."""

import io

from rich.console import Console

from launch.run import progress


def test_the_time_left_leaves_out_the_first_step_which_compiles():
    said = io.StringIO()
    with progress.training(Console(file=said, width=200), total=40, completed=0) as advance:
        for step, seconds in enumerate([12.0, 1.0, 1.0, 1.0], 1):
            advance({"step": step, "loss": 1.0, "tokens": 100, "time": {"step_s": seconds}})
    first, second, last = said.getvalue().splitlines()
    assert first.startswith("step 1/40") and first.endswith("0:07:48 left"), "nothing else is known yet"
    assert second.startswith("step 2/40") and second.endswith("0:00:38 left")
    assert last.startswith("step 4/40") and last.endswith("0:00:36 left")
