"""Models → files that run without this package, each compared with its model first; and such files, run.

Uses `student`; the packages of the extra `export` are imported late. What runs files imports no torch.
"""
