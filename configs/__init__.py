"""Configurations: default.py has every field, each other file its differences from another one.

Sources of the published numbers in their docstrings: [L22] Lu et al., ICML 2022 (this method); [S21a] Song et al.,
ICLR 2021 (score-based models by SDEs); [S21b] Song et al., NeurIPS 2021 (maximum likelihood training of these).
"""
