#!/usr/bin/env bash
# Measures the time and the memory of a training step, in at most 4.5 minutes. docs/gpu.md says what
# each part shows.
source "$(dirname "$0")/common.sh"
steps() { # name, seconds, model, tokens and more arguments
  local name="$1" limit="$2" sizes=(--model "$3" --tokens "${@:4}")
  if [ -n "$dry" ]; then
    [ "$name" = opt-1.3b ] || return 0 # one model runs the same commands as all
    sizes=(--tokens 8 --rows 2 --seconds 0 --device cpu)
  fi
  part "$name" "$limit" "$PYTHON" bench/bench_steps.py --ways ours published "${sizes[@]}"
}

[ -n "$dry" ] || part device 30 "$PYTHON" bench/gpu/device.py
steps opt-1.3b 80 opt-1.3b 64 256 --seconds 0.3
steps opt-125m 35 opt-125m 64 --seconds 0.2 --no-check
steps opt-13b 125 opt-13b 256 --seconds 0.1 --no-check
finish
