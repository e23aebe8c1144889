"""The noise ops in Triton. Only `tables` may be imported without it."""
