"""The update rules behind sampling.py: predictor-corrector updates and few-step solvers."""
