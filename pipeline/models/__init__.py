"""Names and files → models: weights, where they are fetched and kept, device and precision.

Uses `student` and `teacher`; reads no dataset but its class list.
"""
