"""The shell around the pure packages `teacher` and `student`: files, processes, Ray and the command line.

Each room uses the rooms below it, in the order that `pyproject.toml` lists, never one above.
"""
