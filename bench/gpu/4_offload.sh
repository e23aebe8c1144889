#!/usr/bin/env bash
# Compares offloaded OPT models with resident ones: bits, time and memory, in at most 5 minutes.
# docs/gpu.md says what each part shows.
source "$(dirname "$0")/common.sh"
offload() { # name, seconds, model and more arguments
  local name="$1" limit="$2" sizes=(--model "${@:3}")
  if [ -n "$dry" ]; then
    [ "$name" = opt-1.3b ] || return 0 # one model runs the same commands as both
    sizes=(--tokens 8 --rows 2 --seconds 0 --device cpu)
  fi
  part "$name" "$limit" "$PYTHON" bench/bench_offload.py "${sizes[@]}"
}

[ -n "$dry" ] || part device 30 "$PYTHON" bench/gpu/device.py
offload opt-1.3b 90 opt-1.3b --tokens 256 --seconds 0.2
offload opt-13b 180 opt-13b --tokens 256 --seconds 0.2
finish
