"""Measuring the engine on this machine: forwards, decodes, text states, whole runs, and whether bits repeat.

Each part is a file with one function that yields rows, whose arithmetic (medians, counts, targets) stands in
files of its own that need neither torch nor a GPU. `t2v bench` shows them.
"""
