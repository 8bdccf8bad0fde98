"""Runs and models → HTML pages that people open: one file, no network, nothing that runs but what its policy names.

Uses the packages of the extra `report`; imports them late.
"""
