# Sourced by the scripts beside it: `part` runs a part of a script under a time limit of its own,
# and `finish` sums up.
#
# bash bench/gpu/SCRIPT.sh [--dry-run] [PART ...]: all parts, or those named. DRY=1 is --dry-run:
# the same parts with small sizes, as far as they go without a GPU. What is measured and each part's
# whole output are written to $OUT (default: bench/results): a log and at most three files a script.
# $PYTHON (default: python3) needs torch, triton, transformers, pytest and pytest-xdist; the
# extension is built where it is missing. $COMMIT says what was measured where there is no git.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export OUT="${OUT:-bench/results}" PYTHON="${PYTHON:-python3}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
unset TRITON_INTERPRET
mkdir -p "$OUT"
OUT="$(cd "$OUT" && pwd)"
export PYTHONPATH="$PWD/python:$PWD:$PWD/bench${PYTHONPATH:+:$PYTHONPATH}"
# ninja is beside python; NVIDIA's tools may be where their installer puts them
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

# part NAME SECONDS COMMAND...: run it within the seconds. The log gets its output, and the terminal
# the end of that.
part() {
  local name="$1" limit="$2" start=$SECONDS before status
  shift 2
  [[ "$chosen" == " " || "$chosen" == *" $name "* ]] || return 0
  echo "== $script $name: $*" | tee -a "$log"
  [ -z "$dry" ] || limit=$((10 * limit)) # a machine may be slow; what is tried is the commands
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
