#!/usr/bin/env bash
# LIMI-GLM-4.5 from bare nodes to a served model: eight nodes of eight H100, a folder that all of them see, 20 TB free.
# Read it, then run it from a clone on any machine that reaches the head:
#
#     launch/cluster/glm4.5.sh http://HEAD:8265 /shared/limi [NAME=VALUE ...]
#
# Words behind the two override the recipe at every stage. With dry_run=true nothing starts: each stage prints what it would do.
set -euo pipefail
cd "$(dirname "$0")/../.."

# 1. Ray on every node, in a container of slimerl/slime:nightly-dev-20260810a-cu129 with --network host --ipc host
#    --ulimit memlock=-1. Keys of the hub and of Weights & Biases belong into this environment; nothing of the caller's is sent along.
#
#     HF_TOKEN=… ray start --head --dashboard-host=0.0.0.0                  # on the first node
#     HF_TOKEN=… ray start --address=HEAD:6379                              # on each of the others
if (($# < 2)); then
    sed -n '2,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//' >&2
    exit 2
fi
address=$1 root=$2 name=glm4.5
shift 2
for word in "$@"; do [[ $word != run=* ]] || name=${word#run=}; done
words=(MODEL=glm4.5 "cluster.root=$root" "$@")
run=("${words[@]}" "cluster.address=$address")

# 2. What it takes, in two seconds and without the cluster: layout, memory, 20 steps, hours. It ends here if it does not fit.
make plan "${words[@]}"

# 3. The model, 717 GB, once; interrupted, the same command goes on at its byte. All later stages are offline.
make fetch "${run[@]}"

# 4. Everything that would end or spoil the run: checkpoint, data, memory, disk, nodes, slime, network. It ends here at the first red row.
make check "${run[@]}"

# 5. The fullest micro-batch and the longest sequence in one step, a save, a reload: an out-of-memory of hour three, in minutes.
make rehearse "${run[@]}"

# 6. Training, export, sanity check, report. Ctrl-C asks whether to stop or to detach; the same command goes on after any stop.
make train "${run[@]}"

# 7. Served over two nodes as a job: an OpenAI-compatible server on port 30000 of the first one's loopback.
echo "Trained: $root/runs/$name/report.html. To serve it: make serve run=$name cluster.root=$root cluster.address=$address"
