"""Stage 1: shards → Ray actors with the teachers → parts of the logit store.

Uses `teacher`; knows nothing of students and training.
"""
