"""Shards joined with logits → batches: which clips, in which order, read, decoded and joined.

Imports no model package and knows no loop.
"""
