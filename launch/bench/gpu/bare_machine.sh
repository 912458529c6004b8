#!/bin/bash
# Measure and train on a machine that has a GPU and PyTorch, but no package index:
#
#   bare_machine.sh wheels        with an index: fetch what such a machine lacks into .whl/, for its Python 3.12
#   bare_machine.sh OUT PART...   there: each part in turn
#
# A part is one of
#
#   smoke          the smoke step
#   ROW:SIDES      sides of a row of `make bench-gpu`: 4B-32k:ours,theirs,roofline
#   train:MODEL    `make train` of a tiny model, up to the check that needs SGLang; it is stopped once after STOP_S seconds and goes on
#
# The checkout and .whl/ are all that travels. Results stay in bench-gpu/, which a later call may bring along, and in runs/. They are
# packed into OUT while the call runs, so that a call that is cut loses at most the step at hand. LIMIT: seconds of a call. WORDS:
# further overrides of the rows, such as bench.steps=1. Packages may also lie in .whl/ as .tar.xz, which is smaller.
set -uo pipefail
cd "$(dirname "$0")/../../.."
FIRST=${1:?wheels, or a folder for the results}

if [ "$FIRST" = wheels ]; then
    set -e
    mkdir -p .whl
    platforms=()
    for version in 28 27 24 31 34 35 17; do platforms+=(--platform "manylinux_2_${version}_x86_64"); done
    for name in megatron-core hydra-core omegaconf pydantic pydantic_core annotated-types typing-inspection jsonschema \
        jsonschema-specifications referencing rpds-py ray msgpack flash-attn-4 quack-kernels einops apache-tvm-ffi torch_c_dlpack_ext \
        nvidia-cutlass-dsl nvidia-cutlass-dsl-libs-base nvidia-cutlass-dsl-libs-core nvidia-cutlass-dsl-libs-cu13; do
        python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp "${platforms[@]}" \
            --platform manylinux2014_x86_64 --platform manylinux1_x86_64 -d .whl "$(grep -m1 "^$name==" constraints-gpu.txt)"
    done
    python3 -m pip wheel -q --no-deps -w .whl "$(grep -m1 '^antlr4-python3-runtime==' constraints-gpu.txt)"
    du -sh .whl
    exit
fi

OUT=$FIRST
LIMIT=${LIMIT:-540}
STOP_S=${STOP_S:-30}
CLUSTER=${CLUSTER:-h200x1}
SITE=${SITE:-/tmp/limi-site}
PYTHON=${PYTHON:-python3}
HOST_GB=${HOST_GB:-137} # of the machine: what it says at its start may be less
read -ra words <<<"${WORDS:-}"
export PYTHONPATH=$SITE:$SITE/nvidia_cutlass_dsl/dsl_packages # the second one is what that package's .pth adds
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

mkdir -p "$SITE" "$OUT" bench-gpu runs
"$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$SITE" .whl/*.whl || exit
for archive in .whl/*.tar.xz; do [ -e "$archive" ] && tar xJf "$archive" -C "$SITE"; done

pack() {
    tar czf "$OUT/.results" bench-gpu && mv "$OUT/.results" "$OUT/results.tar.gz"
    tar czf "$OUT/.runs" --exclude=checkpoints runs && mv "$OUT/.runs" "$OUT/runs.tar.gz"
}
left() { echo $((LIMIT - SECONDS)); }
limi() { "$@" "cluster.root=$PWD" "cluster.host_memory_gb=$HOST_GB" 2>&1 | tee -a "$OUT/log.txt"; }

(while sleep 20; do pack 2>/dev/null; done) &
packing=$!
trap 'kill $packing; pack' EXIT
nvidia-smi 2>&1 | tee -a "$OUT/log.txt"

for part in "${@:2}"; do
    [ "$(left)" -gt 30 ] || break
    echo "== $part, $(left) s left" | tee -a "$OUT/log.txt"
    case $part in
    smoke) limi "$PYTHON" launch/limi.py bench-gpu smoke=true ;;
    train:*)
        train=("$PYTHON" launch/limi.py train "model=${part#*:}" "cluster=$CLUSTER" layout.ep=1)
        limi timeout --signal=TERM "$STOP_S" "${train[@]}"
        limi "${train[@]}"
        ;;
    *) limi "$PYTHON" launch/limi.py bench-gpu "bench.rows=${part%%:*}" "bench.sides=${part#*:}" "limit_s=$(left)" "${words[@]}" ;;
    esac
    pack
done
