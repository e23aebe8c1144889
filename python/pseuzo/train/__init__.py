"""The trainer, its options, checkpoints and the journal of updates."""
