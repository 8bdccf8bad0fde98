"""A finished dataset: its manifest, shards and classes; a clip, its id and its sound.

Uses storage; knows neither models nor stores.
"""
