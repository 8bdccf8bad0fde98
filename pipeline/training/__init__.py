"""Stage 2: the loop, the run and its folder, its ranks, and the protocols of fine-tuning.

Uses `student` and `teacher`, and every room from `scoring` down; knows no command.
"""
