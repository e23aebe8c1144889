#!/usr/bin/env bash
# Runs the scripts of bench/gpu/ one after the other, in about twenty minutes. See
# docs/gpu.md. --dry-run runs them with small sizes, as far as that is possible without a GPU.
cd "$(dirname "$0")/.." || exit
failed=0
for script in bench/gpu/[1-4]_*.sh; do bash "$script" "$@" || failed=1; done
exit $failed
