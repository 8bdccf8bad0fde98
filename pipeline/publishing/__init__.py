"""Models, stores and datasets → folders that others can use at once, and a Hub that is asked to keep them.

`hub` alone opens a connection, and only where a target says so.
"""
