"""The interface of samplers, the samplers behind sampling.py, and the updates of predictor-corrector samplers."""
