"""What a model needs before it is trained: loading, tuning modes, the objective and where the noise goes."""
