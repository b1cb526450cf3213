"""Experiments: records that are recomputed from the files of a run, comparisons of runs, the list of runs."""
