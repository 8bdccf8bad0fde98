"""Reads again what was made: says what a folder holds, lists its faults, mends what can be made again.

Uses datasets, stores and runs through their own rooms; imports no model package.
"""
