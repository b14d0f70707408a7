"""Objectives of training besides denoising score matching, and the code that all objectives share."""
