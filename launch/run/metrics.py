"""`metrics.jsonl` and TensorBoard: one line per step and one per held-out loss.

`step` counts completed steps. The line of the first step has 1; the held-out loss before it has 0. Timings are under `time`,
so the rest of two runs can be compared exactly.
"""

import json
from pathlib import Path
from typing import Any, TextIO

from data_prep.files import write_text, writing
from recipes import json_file

NAME = "metrics.jsonl"
_FIGURES = ("loss", "heldout_loss", "grad_norm", "lr", "tokens")
MEND = "take that line out, or bring the file back as it was"


class Metrics:
    """Writer of the run's metrics: `metrics.jsonl` and TensorBoard."""

    def __init__(self, root: Path, completed: int) -> None:
        """Open the run's metrics to continue after `completed` steps."""
        self.path = root / NAME
        keep(self.path, completed)
        self._file: TextIO = self.path.open("a", encoding="utf-8")
        self._board = _Board(root / "tensorboard")

    def add(self, line: dict[str, Any]) -> None:
        with writing(self.path):
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        self._board.add(line)

    def close(self) -> None:
        self._file.close()
        self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics file. Omit a last line that a crash truncated: its step will be repeated."""
    found = json_file.lines(path, MEND)
    with json_file.shape(path, MEND):
        for line in found:
            numbers = [line["step"], *(line[name] for name in _FIGURES if name in line)]
            if not all(isinstance(n, int | float) for n in numbers):
                raise TypeError(f"no number in {line}")
    return found


def keep(path: Path, completed: int) -> None:
    """Retain only the lines of the first `completed` steps. Later steps will be repeated and write their lines then."""
    kept = [m for m in read_metrics(path) if m["step"] <= completed] if path.exists() and completed else []
    text = "".join(json.dumps(m) + "\n" for m in kept)
    if not path.exists() or path.read_bytes() != text.encode():
        write_text(path, text)  # atomic: a crash here must not lose or repeat the lines of earlier steps


def shown(line: dict[str, Any]) -> str:
    """Return a step's loss and gradient norm as text, exact to the last bit."""
    return f"loss {line['loss']!r}, gradient norm {line['grad_norm']!r}"


def completed(root: Path) -> int:
    """Return the last step in the run's metrics; 0 if there is none."""
    path = root / NAME
    return max((m["step"] for m in read_metrics(path)), default=0) if path.exists() else 0


def losses(root: Path) -> list[float]:
    """Return the losses of the run's steps, in order."""
    return [m["loss"] for m in read_metrics(root / NAME) if "loss" in m]


def rates(root: Path) -> list[float]:
    """Return the learning rates of the run's steps, in order."""
    lines = read_metrics(root / NAME)
    with json_file.shape(root / NAME, MEND):
        return [m["lr"] for m in lines if "loss" in m]


def heldout_losses(path: Path) -> dict[int, float]:
    """Return {completed steps: held-out loss}, in order."""
    return {m["step"]: m["heldout_loss"] for m in read_metrics(path) if "heldout_loss" in m}


class _Board:
    """Writer of TensorBoard's event file. It does not use torch, which takes two seconds to import."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(str(folder))

    def add(self, line: dict[str, Any]) -> None:
        import time

        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        numbers = {
            k: v for k, v in {**line, **line.get("time", {})}.items() if isinstance(v, int | float) and k != "step"
        }
        values = [Summary.Value(tag=name, simple_value=number) for name, number in numbers.items()]
        self._writer.add_event(Event(wall_time=time.time(), step=line["step"], summary=Summary(value=values)))

    def close(self) -> None:
        self._writer.close()
