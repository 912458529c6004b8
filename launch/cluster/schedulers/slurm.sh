set -euo pipefail

# Without Pyxis nodes run their own software: `engine.python` must be the Python that has slime. With Pyxis each node has one container
# for the whole job, so that all processes of a node share its /tmp; a requeued job finds it again, and nothing is imported twice.
container=()
if [[ -n "${LIMI_IMAGE:-}" ]]; then
    container=(--container-image="$LIMI_IMAGE" --container-name="limi-$SLURM_JOB_ID" --container-workdir="$checkout"
        --container-mounts="$checkout:$checkout,$root:$root")
fi
mkdir -p "$root"
cd "$checkout"

# A private token for this job: others on the network cannot use its Ray.
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
read -r head < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
address=$(scontrol show node "$head" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p') # its name need not resolve

# Both functions run on the nodes, one process tree a node. Slurm signals the function's process group; Ray and the command are in
# groups of their own, and end when the function says so.
# shellcheck disable=SC2317 # called on the nodes
on_head() {
    local ray job cluster="cluster.address=http://127.0.0.1:$dashboard" status signalled=1
    setsid "$python" -m ray.scripts.scripts start --head --block --port="$port" --dashboard-port="$dashboard" --num-gpus="$gpus" &
    ray=$!
    trap 'kill "$ray" 2>/dev/null; wait "$ray" || true' EXIT
    "$python" launch/cluster/schedulers/wait_for_gpus.py "$address:$port" "$((nodes * gpus))" "$timeout"
    setsid "$python" launch/limi.py train "${words[@]}" "$cluster" &
    job=$!
    trap 'signalled=1; setsid "$python" launch/limi.py stop "run=$run" "$cluster" || true' TERM USR1
    while ((signalled)); do # a signal ends the wait, not the job
        signalled=0 status=0
        wait "$job" || status=$?
    done
    exit "$status"
}
# shellcheck disable=SC2317
on_worker() {
    local ray=
    trap : TERM USR1 # the head ends the run first
    trap 'kill "$ray"' USR2
    setsid "$python" -m ray.scripts.scripts start --block --address="$address:$port" --num-gpus="$gpus" &
    ray=$!
    while kill -0 "$ray" 2>/dev/null; do wait "$ray" || true; done # a signal ends the wait
}
here=$(declare -p run nodes gpus port dashboard timeout python words address)
here+=$'\n'$(declare -f on_head on_worker)

# Every core of a node to its one step.
step=(srun --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" --cpu-bind=none --kill-on-bad-exit=1 "${container[@]}")
"${step[@]}" --nodes=1 --ntasks=1 --nodelist="$head" bash -euo pipefail -c "$here"$'\n'on_head &
running=($!)
if ((nodes > 1)); then
    "${step[@]}" --nodes=$((nodes - 1)) --ntasks=$((nodes - 1)) --exclude="$head" bash -euo pipefail -c "$here"$'\n'on_worker &
    running+=($!)
fi

# USR1 comes before the time limit, and before a preemption where slurm.conf has PreemptParameters=send_user_signal (before Slurm 23
# SlurmctldParameters=preempt_send_user_signal): the job goes on in the next allocation. TERM ends it: scancel, or
# scancel --batch --signal=TERM.
requeue=no
trap 'requeue=yes; kill -USR1 "${running[0]}"' USR1
trap 'kill -TERM "${running[0]}"' TERM
while kill -0 "${running[0]}" 2>/dev/null; do
    sleep 1 &
    wait $! || true # a signal ends the wait
    if ((nodes > 1)) && ! kill -0 "${running[1]}" 2>/dev/null && kill -0 "${running[0]}" 2>/dev/null; then
        echo "a node of $SLURM_JOB_NODELIST has ended its part, as it says above: the run is stopped" >&2
        kill -TERM "${running[0]}"
        wait "${running[0]}" || true
        exit 1
    fi
done
status=0
wait "${running[0]}" || status=$?
if ((nodes > 1)); then
    kill -USR2 "${running[1]}" 2>/dev/null || true
    wait "${running[1]}" || true
fi
if [[ "$requeue" == yes && "$status" == 130 ]]; then # stopped, and not finished
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
