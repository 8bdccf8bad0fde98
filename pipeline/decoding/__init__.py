"""Processes and threads that turn clips' bytes into waveforms, for stage 1, stage 2, scoring and ingest alike.

Knows clips and their sound, but neither models nor stores.
"""
