"""Sweeps: one file that says which settings to try, the runs that come of it, and one table over seeds.

definition.py   the file, read into planned runs, every problem at once
progress.py     how far each planned run is, and whether its folder is of this definition
running.py      the processes, so many at a time
table.py        means and deviations over seeds
"""
