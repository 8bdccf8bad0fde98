"""Paths and URLs: whole files, byte ranges, caches; `remote` alone knows servers.

Knows nothing of what the bytes mean.
"""
