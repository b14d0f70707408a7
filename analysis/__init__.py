"""Diagnostics of score models: the ODE's own score, distances between scores, entropies, trajectories."""
