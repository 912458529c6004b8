"""`make slurm`: the sbatch script of a run. It starts Ray on every node and runs the recipe there as a Ray job.

The script is a header with the recipe's numbers and words, and `slurm.sh`. Site-specific choices (partition, account, time limit) are
options of sbatch.
"""

import shlex
from pathlib import Path

from launch.cluster.image.pins import IMAGE
from launch.cluster.schedulers.required import check_cluster
from recipes.config import Recipe
from recipes.paths import REPO

BODY = Path(__file__).with_name("slurm.sh")
PORT, DASHBOARD = 6379, 8265
GRACE_S = 600  # least time between Slurm's signal and the time limit
_MARGIN = 1.5  # on predicted times

_HEADER = """\
#!/bin/bash
#SBATCH --job-name=limi-{run}
#SBATCH --output=limi-{run}-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
{gpus_line}#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --signal=B:USR1@{grace}
# Site-specific choices are options of sbatch, as: sbatch --partition=NAME --account=NAME --time=24:00:00 THIS_FILE
# {grace} s before the time limit the step ends and is saved, and the job is requeued: it goes on from there.
# With Pyxis, import the image once: enroot import -o /shared/slime.sqsh docker://{image}
# and submit with it: LIMI_IMAGE=/shared/slime.sqsh sbatch THIS_FILE
# Keys of the Hub and of W&B come from the environment of sbatch.
run={run} nodes={nodes} gpus={gpus} port={port} dashboard={dashboard} timeout={timeout}
checkout={checkout}
root={root}
python={python}
# shellcheck disable=SC2016 # as typed
words=({words})
"""


def slurm(recipe: Recipe, grace: float = 0.0) -> str:
    """Return the sbatch script. grace: predicted seconds of a step and a save.

    Raise `ConfigError` for cluster=local, or if cluster.root is not given for the nodes.
    """
    check_cluster(recipe, "slurm")
    c = recipe.cluster
    header = _HEADER.format(
        run=recipe.run,
        nodes=c.nodes,
        gpus=c.gpus_per_node,
        gpus_line=f"#SBATCH --gpus-per-node={c.gpus_per_node}\n" if recipe.gpu.memory_mib else "",
        grace=max(GRACE_S, int(_MARGIN * grace)),
        image=IMAGE,
        port=PORT,
        dashboard=DASHBOARD,
        timeout=recipe.engine.timeout,
        checkout=shlex.quote(str(REPO)),
        root=shlex.quote(c.root),
        python=shlex.quote(recipe.engine.python or "python3"),
        words=shlex.join(w for w in recipe.overrides if not w.startswith("cluster.address=")),
    )
    return header + BODY.read_text(encoding="utf-8")
