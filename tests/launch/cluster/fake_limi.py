"""Stands in for `launch/limi.py` and for the wait that a Slurm script makes: writes its words to `$LOG/STAGE`, and for `train`, where
`$WAIT` is set, waits for `stop`."""

import json
import os
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    log, words = Path(os.environ["LOG"]), sys.argv[1:]
    if words[0] == "-":
        (log / "wait").write_text(json.dumps(words))
        sys.exit()
    (log / words[1]).write_text(json.dumps([words, str(Path.cwd())]))
    while words[1] == "train" and "WAIT" in os.environ and not (log / "stop").exists():
        time.sleep(0.05)
    sys.exit(int(os.environ.get("STATUS", "0")))
