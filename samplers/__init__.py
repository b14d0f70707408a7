"""The interface of samplers, the samplers that sampling.py builds, and the updates of predictor-corrector samplers."""
