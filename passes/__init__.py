"""Passes over a data set with one set of parameters: test loss, likelihood, samples.

A pass counts every image once. What it works out is kept batch by batch in a folder named after everything the numbers
depend on, parameters included; so an interrupted pass goes on where it was and never mixes two settings. The random
numbers of an image follow from the seed, the repeat and the image's index, not from its batch.
"""
