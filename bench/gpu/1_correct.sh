#!/usr/bin/env bash
# Checks in at most 4.5 minutes that the kernels are right on this GPU. docs/gpu.md says what each
# part shows.
source "$(dirname "$0")/common.sh"
read -ra files <<<"$(grep -lE 'mark\.gpu\b' tests/*/test_*.py | tr '\n' ' ')"
workers=$(($(nproc) < 12 ? $(nproc) : 12))
tests=(-v -ra -m gpu -p no:cacheprovider --dist worksteal -o faulthandler_timeout=60)
if "$PYTHON" -c 'import pytest_timeout' 2>/dev/null; then
  tests+=(--timeout=90 --timeout-method=thread)
fi
kernels=(--no-check --dtype bfloat16 --K 1 14)
if [ -n "$dry" ]; then # one file of tests runs the same commands as all
  workers=0
  read -ra files <<<"$(grep -lE '^@pytest.mark.gpu' tests/kernels/test_*.py | head -n 1)"
  kernels+=(--n 20000 --seconds 0 --device cpu)
else
  kernels+=(--seconds 0.2)
fi

part device 60 "$PYTHON" bench/gpu/device.py
part mask 20 "$PYTHON" bench/gpu/mask.py
part tests 130 "$PYTHON" -m pytest "${tests[@]}" -n $workers "${files[@]}"
part kernels 60 "$PYTHON" bench/bench_add_noise.py "${kernels[@]}"
finish
