#!/usr/bin/env bash
# Runs everything that needs a GPU, in about eight minutes: bash tests/gpu/run.sh [check] [time] [sanitize].
# The default is all three. Each step prints its exit status. A failed step does not stop the next one. A step that
# ends with 124 has run past its time limit. Logs go to $OUT (default: gpu_out).
set -u
cd "$(dirname "$0")/../.."
OUT=${OUT:-gpu_out}
mkdir -p "$OUT"
export PROTO_REG_CACHE=${PROTO_REG_CACHE:-$PWD/gpu_out/cache} PYTHONPATH=$PWD PYTHONUNBUFFERED=1
LIMIT=${LIMIT:-240}
wanted=${*:-check time sanitize}
begin=$SECONDS

step() { # NAME COMMAND...
  local name=$1
  shift
  timeout "$LIMIT" "$@" >"$OUT/$name.txt" 2>&1
  local status=$?
  echo "== $((SECONDS - begin)) s: $name: exit status $status"
  tail -n "${LINES_SHOWN:-4}" "$OUT/$name.txt"
}

test_gpu() { python3 -m pytest -q --tb=short -p no:cacheprovider "$@"; }
export -f test_gpu

sanitize() { compute-sanitizer --tool "$1" --error-exitcode 9 python3 -m pytest -q -x -p no:cacheprovider "tests/gpu/test_sinkhorn_cuda.py" -k "$2"; }
export -f sanitize

step card nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem --format=csv
step build python3 -m proto_reg build cuda
if [[ $wanted == *check* ]]; then
  # The forced regimes run first, because their fixture compiles a library.
  step regimes bash -c 'test_gpu tests/gpu/test_sinkhorn_cuda.py -k "ragged or robustness or iterations or tol or weights or largest"'
  step sinkhorn bash -c 'test_gpu tests/gpu/test_sinkhorn_cuda.py -k "not timings and not ragged and not robustness and not iterations and not tol and not weights and not largest"' &
  step layer bash -c 'test_gpu tests/gpu/test_layer_cuda.py' &
  step streams python3 tests/gpu/streams.py &
  step old_ptx env PROTO_REG_CACHE="$PROTO_REG_CACHE/ptx80" PROTO_REG_CUDA_ARCHS=8.0+PTX bash -c \
    'python3 -m proto_reg build cuda && python3 tests/gpu/old_ptx.py' &
  wait
fi
if [[ $wanted == *time* ]]; then
  LINES_SHOWN=60 step host python3 tests/gpu/host_time.py
  LINES_SHOWN=400 step timings python3 -m pytest -q -s -p no:cacheprovider tests/gpu/test_sinkhorn_cuda.py -k timings
fi
if [[ $wanted == *sanitize* ]]; then
  LIMIT=200
  for tool in memcheck racecheck synccheck; do
    step "$tool" bash -c "sanitize $tool 'ragged and dtype0'" &
  done
  wait
fi
rm -rf "$PROTO_REG_CACHE/ptx80"
