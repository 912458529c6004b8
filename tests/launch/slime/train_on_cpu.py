"""Run by a Python that has what slime imports: slime's own `train_async.py` on a Ray of this machine, with as many GPUs as the first
argument pretends, and the list that comes on standard input as JSON."""

import json
import os
import runpy
import sys

import ray

words = json.load(sys.stdin)
ray.init(address="local", num_cpus=int(sys.argv[1]) + 4, num_gpus=int(sys.argv[1]), include_dashboard=False)
sys.argv = ["train_async.py", *words]
runpy.run_path(f"{os.environ['SLIME_ROOT']}/train_async.py", run_name="__main__")
