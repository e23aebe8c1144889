#!/usr/bin/env bash
# Shows the hardware's counters and how time grows, in at most 3 minutes. docs/gpu.md says what each
# part shows.
source "$(dirname "$0")/common.sh"
growth=(--max 28 --tokens 64 256 --seconds 0.15)
# These are the tests of the window, and those of tensors whose last chunk is masked.
names='gpu_bad_step_and_determinism|gpu_matches_formula|list_in_one_launch|rows'
files=(tests/kernels/test_*{window,triton}*.py)
read -ra checked <<<"$(grep -lE "def test_($names)\(" "${files[@]}" | tr '\n' ' ')"
cases="gpu_bad_step or (gpu_matches_formula and 14-7-torch.bfloat16)"
cases+=" or test_list_in_one_launch or hadamard-100"
checked+=(-q -ra -p no:cacheprovider -k "$cases")
# Errors of the CUDA API may be answers that a library asked for.
sanitizer=(compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 9)
if [ -n "$dry" ]; then growth=(--max 12 --tokens 4 8 --seconds 0 --device cpu) sanitizer=(); fi

[ -n "$dry" ] || part device 30 "$PYTHON" bench/gpu/device.py
part counters 60 "$PYTHON" bench/gpu/counters.py
# Without torch's cache of memory each tensor is a separate allocation, whose bounds are checked.
part sanitizer 50 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
  "${sanitizer[@]}" "$PYTHON" -m pytest "${checked[@]}"
part growth 40 "$PYTHON" bench/bench_growth.py --no-check "${growth[@]}"
finish
