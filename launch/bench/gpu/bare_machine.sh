#!/bin/bash
# Measure on a machine that has a GPU and PyTorch, but no package index:
#
#   bare_machine.sh wheels         with an index: fetch what such a machine lacks into .whl/, for its Python 3.12
#   bare_machine.sh first  OUT     there: the smoke step, then the rows of most worth
#   bare_machine.sh second OUT     there: the other rows; also goes on with what the first call left
#
# The checkout and .whl/ are all that travels. Results stay in bench-gpu/, which a later call may bring along, and are packed into
# OUT/results.tar.gz while the call runs, so that a call that is cut loses at most the step at hand. LIMIT: seconds of a call. WORDS:
# further overrides, such as bench.steps=1. Extra packages may lie in .whl/ as .tar.xz.
set -uo pipefail
cd "$(dirname "$0")/../../.."
MODE=${1:?wheels, first or second}

if [ "$MODE" = wheels ]; then
    set -e
    mkdir -p .whl
    platforms=()
    for version in 28 27 24 31 34 35 17; do platforms+=(--platform "manylinux_2_${version}_x86_64"); done
    for name in megatron-core hydra-core omegaconf pydantic pydantic_core annotated-types typing-inspection jsonschema \
        jsonschema-specifications referencing rpds-py; do
        python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp "${platforms[@]}" \
            --platform manylinux2014_x86_64 --platform manylinux1_x86_64 -d .whl "$(grep -m1 "^$name==" constraints.txt)"
    done
    python3 -m pip wheel -q --no-deps -w .whl "$(grep -m1 '^antlr4-python3-runtime==' constraints.txt)"
    du -sh .whl
    exit
fi

OUT=${2:?a folder for the results}
LIMIT=${LIMIT:-540}
SITE=${SITE:-/tmp/limi-site}
PYTHON=${PYTHON:-python3}
HOST_GB=${HOST_GB:-137} # of the machine: what it says at its start may be less
read -ra words <<<"${WORDS:-}"
export PYTHONPATH=$SITE PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

mkdir -p "$SITE" "$OUT" bench-gpu
"$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$SITE" .whl/*.whl || exit
for archive in .whl/*.tar.xz; do [ -e "$archive" ] && tar xJf "$archive" -C "$SITE"; done

pack() { tar czf "$OUT/.results" bench-gpu && mv "$OUT/.results" "$OUT/results.tar.gz"; }
left() { echo $((LIMIT - SECONDS)); }
limi() { "$PYTHON" launch/limi.py bench-gpu "cluster.root=$PWD" "$@" 2>&1 | tee -a "$OUT/log.txt"; }
kernel() { # the fastest that the smoke step found
    "$PYTHON" - <<'END'
import json
from pathlib import Path

path = Path("bench-gpu/smoke.json")
checks = json.loads(path.read_text())["checks"] if path.is_file() else []
best = [check["numbers"]["best"] for check in checks if "best" in check["numbers"]]
print(f"gpu.attention={best[-1]}" if best else "gpu.attention=varlen")
END
}
rows() { # ROWS SIDES: within what is left of the call
    [ "$(left)" -gt 30 ] || return 0
    limi "bench.rows=$1" "bench.sides=$2" "cluster.host_memory_gb=$HOST_GB" "limit_s=$(left)" "$(kernel)" "${words[@]}"
    pack
}

(while sleep 10; do pack 2>/dev/null; done) &
packing=$!
trap 'kill $packing; pack' EXIT
nvidia-smi 2>&1 | tee -a "$OUT/log.txt"

if [ "$MODE" = first ]; then
    limi smoke=true
    pack
    rows 4B-32k profile
    rows 4B-32k ours,theirs,roofline
    rows 4B-8k ours,theirs,roofline
else
    rows 4B-32k ours,theirs,roofline
    rows 4B-152k ours
    rows 4B-8k ours,theirs,roofline
    rows 4B-152k roofline
    rows 4B-16k ours,theirs,roofline
    rows 0.6B-16k ours,theirs,roofline
    rows 4B-LIMI-like-pack ours,theirs,roofline
fi
