import json

import pytest

from launch.run import metrics as module
from launch.run.metrics import Metrics, heldout_losses, keep, read_metrics


def test_going_on_keeps_the_lines_of_completed_steps_only(tmp_path):
    first = Metrics(tmp_path, 0)
    first.add({"step": 0, "heldout_loss": 3.0})
    for step in range(1, 6):
        first.add({"step": step, "loss": 1.0 / step, "time": {"step_s": 0.1}})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # a crash in the middle of a line
    again = Metrics(tmp_path, 3)
    again.add({"step": 4, "loss": 9.0})
    again.close()
    assert [m["step"] for m in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3, 4]
    assert heldout_losses(tmp_path / "metrics.jsonl") == {0: 3.0}
    assert any((tmp_path / "tensorboard").iterdir())


def test_starting_anew_forgets_what_was_there(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 7, "loss": 1.0}) + "\n")
    Metrics(tmp_path, 0).close()
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_a_number_that_is_not_finite_never_reaches_the_file(tmp_path):
    metrics = Metrics(tmp_path, 0)
    with pytest.raises(ValueError, match="not JSON compliant"):
        metrics.add({"step": 1, "loss": float("nan")})
    metrics.close()


def test_a_disk_that_is_full_takes_no_line_of_an_earlier_start(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    text = "".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(1, 6))
    path.write_text(text)

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(module, "write_text", full)
    keep(path, 5)  # nothing to leave out, nothing to write
    with pytest.raises(OSError, match="No space"):
        keep(path, 3)
    assert path.read_text() == text
