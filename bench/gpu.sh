#!/usr/bin/env bash
# All that a GPU has to show, in about a quarter of an hour: the three scripts of bench/gpu/, one
# after the other. See docs/gpu.md. --dry-run: the same with small sizes, as far as it goes without
# a GPU.
cd "$(dirname "$0")/.." || exit
failed=0
for script in bench/gpu/[1-3]_*.sh; do bash "$script" "$@" || failed=1; done
exit $failed
