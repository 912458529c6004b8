"""Generate the sample: `python -m data_prep.sample.make [--seed 0] [--out FOLDER]`."""

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from data_prep.sample import plans, tools

SYSTEM = "You work on files with tools."


class Made(NamedTuple):
    """A record, and the initial files of its scratch folder by path."""

    record: dict[str, Any]
    files: dict[str, str]


def lay_out(files: dict[str, str], root: Path) -> None:
    """Write the initial files of a trajectory into its scratch folder."""
    for path, content in files.items():
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content, encoding="utf-8", newline="\n")


def trajectory(plan: plans.Plan) -> Made:
    """Run the plan's calls in a new scratch folder and return the record."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": SYSTEM}]
    count = 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        lay_out(plan.files, root)
        answers: list[str] | None = None
        while True:
            try:
                turn = plan.script.send(answers)  # type: ignore[arg-type]  # None starts a generator
            except StopIteration:
                break
            message: dict[str, Any] = {"role": turn.role, "content": turn.text}
            messages.append(message)
            answers, results, calls = [], [], []
            for name, arguments in turn.calls:
                count += 1
                function = {"name": name, "arguments": arguments}
                calls.append({"id": f"call_{count}", "type": "function", "function": function})
                answers.append(tools.call(name, arguments, root))
                result = {"role": "tool", "tool_call_id": f"call_{count}", "name": name, "content": answers[-1]}
                results.append(result)
            if calls:
                message["tool_calls"] = calls
            messages += results
    return Made({"messages": messages, "tools": tools.TOOLS}, plan.files)


def sample(seed: int) -> tuple[list[Made], list[Made]]:
    """Return the training and the held-out trajectories. All user messages are distinct across both."""
    rng = Random(seed)
    seen: set[str] = set()

    def draw(family: plans.Family) -> Made:
        while True:
            made = trajectory(family(rng))
            asked = [message["content"] for message in made.record["messages"] if message["role"] == "user"]
            if len(set(asked) - seen) == len(asked):
                seen.update(asked)
                return made

    return [draw(family) for family in plans.TRAIN], [draw(family) for family in plans.HELDOUT]


def starting_files() -> dict[str, dict[str, str]]:
    """Return the initial files of each trajectory of the committed sample by path, keyed by its first request, which is unique."""
    train, heldout = sample(0)
    return {made.record["messages"][1]["content"]: made.files for made in train + heldout}


def write(path: Path, sample_part: Sequence[Made]) -> None:
    """Write the records as JSON Lines, atomically."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            for made in sample_part:
                file.write(json.dumps(made.record, ensure_ascii=False, separators=(",", ":")) + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Generate the sample trajectories.")
    parser.add_argument("--seed", type=int, default=0, help="seed of the plans' parameters (default 0)")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent, help="output folder (default: the folder of this script)"
    )
    options = parser.parse_args(arguments)
    train, heldout = sample(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    write(options.out / "train.jsonl", train)
    write(options.out / "heldout.jsonl", heldout)


if __name__ == "__main__":
    main()
