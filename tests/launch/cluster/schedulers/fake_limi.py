"""Stands in for the Python of a node: writes what Ray's command line gets to `$LOG/ray.log`, and other words to `$LOG/STAGE`.

`ray start` runs until it is ended, a worker's only until `train` where `$LOSE` is set. `train` waits for `stop` where `$WAIT` is set,
and ends with `$STATUS`.
"""

import json
import os
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    log, words = Path(os.environ["LOG"]), sys.argv[1:]
    if words[0] == "-m":
        with (log / "ray.log").open("a") as file:
            file.write(" ".join(words) + "\n")
        while not ("LOSE" in os.environ and "--head" not in words and (log / "train").exists()):
            time.sleep(0.05)
        sys.exit(1)
    if words[0].endswith("wait_for_gpus.py"):
        (log / "wait").write_text(json.dumps(words))
        while len((log / "ray.log").read_text().splitlines() if (log / "ray.log").exists() else []) < (
            2 if int(words[2]) > 8 else 1
        ):
            time.sleep(0.05)
        sys.exit()
    partial = log / f".{words[1]}"
    partial.write_text(json.dumps([words, str(Path.cwd())]))
    partial.rename(log / words[1])
    while words[1] == "train" and "WAIT" in os.environ and not (log / "stop").exists():
        time.sleep(0.05)
    sys.exit(int(os.environ.get("STATUS", "0")) if words[1] == "train" else 0)
