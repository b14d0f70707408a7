"""Infrastructure without any of the method's equations: files, checkpoints, metrics, the console, parallelism."""
