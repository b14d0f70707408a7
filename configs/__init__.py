"""Configurations: default.py has every field, and each other file states its differences from another file.

The docstrings quote published numbers from [L22] (this method), [S21a] (score-based models by SDEs) and [S21b]
(maximum-likelihood training of these models); docs/references.md has the papers. No model of a published configuration
has been trained or evaluated in this project.
"""
