"""The report of a run, read back from its folder: an HTML page, figures and text tables."""
