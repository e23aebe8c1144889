#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: build the extension, run the GPU tests, run the benchmarks, write the results to
# $OUT (default bench/results). Needs python3 with torch (CUDA), triton, transformers, pytest, ninja and pybind11; no network.
# ONLY="steps growth report" runs just those, where one call may not last long enough for all.
# --dry-run: the same on a CPU with small sizes, to find typos before a GPU is paid for.
set -uo pipefail
cd "$(dirname "$0")/.."
export OUT="${OUT:-bench/results}"
export PYTHONPATH="$PWD:$PWD/python:$PWD/bench${PYTHONPATH:+:$PYTHONPATH}"
PYTHON="${PYTHON:-python3}"
mkdir -p "$OUT"
log="$OUT/gpu.log"
[ -n "${ONLY:-}" ] || : >"$log"
failed=0

step() { # name, command...: runs it, keeps the log, goes on after a failure
  local name="$1" start=$SECONDS
  shift
  [[ " ${ONLY:-$name} " == *" $name "* ]] || return 0
  echo "== $name: $*" | tee -a "$log"
  if "$@" 2>&1 | tee -a "$log"; then
    echo "== $name: ok, $((SECONDS - start)) s" | tee -a "$log"
  else
    echo "== $name: FAILED, $((SECONDS - start)) s" | tee -a "$log"
    failed=1
  fi
}

if [ "${1:-}" = "--dry-run" ]; then
  build=cpu
  tests=(tests/test_api.py -k "not inductor")
  sizes=(--n 300000 --K 1 14 --threads 1)
  steps=(--tokens 16 --rows 4)
  growth=(--max 18 --tokens 8 16)
  demo=(--steps 2 --device cpu)
else
  build=cuda
  tests=(tests)
  sizes=(--K 1 4 14 64 1000)
  steps=()
  growth=()
  demo=(--device cuda)
  step device nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
fi
step versions "$PYTHON" -c 'import torch, triton, transformers, sys; print(sys.version, torch.__version__, triton.__version__, transformers.__version__, torch.cuda.is_available() and torch.cuda.get_device_name())'
step build env PSEUZO_BUILD=$build "$PYTHON" setup.py build_ext --inplace
step tests "$PYTHON" -m pytest -q -p no:cacheprovider "${tests[@]}"
step add_noise "$PYTHON" bench/bench_add_noise.py "${sizes[@]}"
step steps "$PYTHON" bench/bench_steps.py "${steps[@]}"
step growth "$PYTHON" bench/bench_growth.py "${growth[@]}"
step report "$PYTHON" bench/report.py
step sass "$PYTHON" bench/sass_cost.py --json "$OUT/sass.json"
step demo "$PYTHON" -m pseuzo demo --out "$OUT/demo" "${demo[@]}"
rm -rf "$OUT/demo/model"
echo "== results in $OUT, $([ $failed = 0 ] && echo 'everything passed' || echo 'SOMETHING FAILED')"
exit $failed
