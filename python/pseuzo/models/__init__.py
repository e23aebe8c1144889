"""What a model needs before it is trained: loading, tuning modes, an objective, a placement of
noise."""
