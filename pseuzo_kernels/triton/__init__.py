"""The noise op in Triton."""
