#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: build the extension, run the GPU tests, run the benchmarks, write the results to
# $OUT (default bench/results). Needs python3 with torch (CUDA), triton, transformers, matplotlib, pytest, pytest-xdist,
# ninja and pybind11; no network. Where there is no git, $COMMIT says what the rows are of.
# ONLY="steps growth report" runs just those, STEPS="--model opt-13b" is passed to bench_steps.py. Rows are written as
# they are measured, and the largest models come last, so a call that is cut off loses only what it was measuring. Where
# a call may last ten minutes:
#   ONLY="device versions build tests tests_cpu"    ONLY="build sass add_noise growth"
#   ONLY="build steps" STEPS="--model opt-125m opt-350m opt-1.3b opt-2.7b"
#   ONLY="build steps" STEPS="--model opt-6.7b"    and so on
# and then `python bench/report.py --add DIR ...` takes in the rows of all calls' folders and makes tables and plots.
# --dry-run: the same on a CPU with small sizes, to find typos before a GPU is paid for; and the Triton kernels checked
# in their interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."
export OUT="${OUT:-bench/results}"
export PYTHONPATH="$PWD:$PWD/python:$PWD/bench${PYTHONPATH:+:$PYTHONPATH}"
PYTHON="${PYTHON:-python3}"
mkdir -p "$OUT"
log="$OUT/gpu.log"
[ -n "${ONLY:-}" ] || : >"$log"
failed=0
read -ra more_steps <<<"${STEPS:-}"

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
  sizes=(--n 300000 --K 1 14 --seconds 0.05)
  steps=(--tokens 16 --rows 4 --seconds 0.05)
  growth=(--max 18 --tokens 8 16 --seconds 0.05)
  demo=(--steps 2 --device cpu)
else
  build=cuda
  tests=(tests -m gpu)
  sizes=()
  steps=()
  growth=()
  demo=(--device cuda)
  step device nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
fi
step versions "$PYTHON" -c 'import torch, triton, transformers, sys; print(sys.version, torch.__version__, triton.__version__, transformers.__version__, torch.cuda.is_available() and torch.cuda.get_device_name())'
step build env PSEUZO_BUILD=$build "$PYTHON" setup.py build_ext --inplace
step tests "$PYTHON" -m pytest -q -p no:cacheprovider "${tests[@]}"
[ $build = cpu ] || step tests_cpu env CUDA_VISIBLE_DEVICES= "$PYTHON" -m pytest -q -p no:cacheprovider -n 8 tests
step sass "$PYTHON" bench/sass_cost.py --json "$OUT/sass.json" --arch 80 90 --predict
[ $build = cuda ] || step interpret env TRITON_INTERPRET=1 "$PYTHON" bench/bench_add_noise.py --check --n 5000 --K 1 14
step add_noise "$PYTHON" bench/bench_add_noise.py "${sizes[@]}"
step steps "$PYTHON" bench/bench_steps.py "${steps[@]}" "${more_steps[@]}"
step growth "$PYTHON" bench/bench_growth.py "${growth[@]}"
step report "$PYTHON" bench/report.py
scratch="$(mktemp -d)"
step demo "$PYTHON" -m pseuzo demo --out "$scratch/demo" "${demo[@]}"
rm -rf "$scratch"
echo "== results in $OUT, $([ $failed = 0 ] && echo 'everything passed' || echo 'SOMETHING FAILED')"
exit $failed
