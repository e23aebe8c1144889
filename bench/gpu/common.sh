# The scripts beside this file source it. `part` runs a part of a script under its own time limit,
# and `finish` lists the outcomes.
#
# bash bench/gpu/SCRIPT.sh [--dry-run] [PART ...] runs all parts, or those named. --dry-run or
# DRY=1 runs the same parts with small sizes, as far as that is possible without a GPU. Measurements
# and each part's whole output are written to $OUT (default: bench/results): a log and at most three
# files per script. $PYTHON (default: python3) needs torch, triton, transformers, pytest and
# pytest-xdist. The extension is built if it is missing. $COMMIT names the commit without git.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export OUT="${OUT:-bench/results}" PYTHON="${PYTHON:-python3}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
unset TRITON_INTERPRET
mkdir -p "$OUT"
OUT="$(cd "$OUT" && pwd)"
export PYTHONPATH="$PWD/python:$PWD:$PWD/bench${PYTHONPATH:+:$PYTHONPATH}"
# ninja is beside python, and NVIDIA's tools may be in the folders that their installer uses.
PATH="$("$PYTHON" -c 'import sys; print(sys.prefix)')/bin:$PATH:/usr/local/cuda/bin"
for folder in /opt/nvidia/nsight-compute/*/; do PATH="$PATH:${folder%/}"; done
script="$(basename "$0" .sh)"
log="$OUT/$script.log"
dry="${DRY:-}"
chosen=" "
failed=0
summary=()
for argument in "$@"; do
  if [ "$argument" = --dry-run ]; then dry=1; else chosen+="$argument "; fi
done
export DRY="$dry"
if [ -n "$dry" ]; then export CUDA_VISIBLE_DEVICES=; fi
[ "$chosen" != " " ] || : >"$log"

# part NAME SECONDS COMMAND... runs the command within the seconds. Its output goes to the log, and
# the end of the output to the terminal.
part() {
  local name="$1" limit="$2" start=$SECONDS before status
  shift 2
  [[ "$chosen" == " " || "$chosen" == *" $name "* ]] || return 0
  echo "== $script $name: $*" | tee -a "$log"
  [ -z "$dry" ] || limit=$((10 * limit)) # the dry run tries the commands, maybe on a slow machine
  before=$(wc -c <"$log")
  timeout --kill-after=5 "$limit" "$@" >>"$log" 2>&1
  status=$?
  tail -c "+$((before + 1))" "$log" | grep -v Warning | tail -n 30 | cut -c1-170
  case $status in
    0) summary+=("$name: ok, $((SECONDS - start)) s of $limit") ;;
    124 | 137) summary+=("$name: STOPPED after $limit s") failed=1 ;;
    *) summary+=("$name: FAILED ($status), $((SECONDS - start)) s of $limit") failed=1 ;;
  esac
  echo "== $script ${summary[-1]}" | tee -a "$log"
}

finish() {
  printf '== %s\n' "$script, $SECONDS s, results in $OUT" "${summary[@]}" | tee -a "$log"
  exit $failed
}
