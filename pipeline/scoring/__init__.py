"""Logits → metrics, tables and pictures; models and batches → the logits that are scored.

Uses `student` and `teacher`; nothing learns here.
"""
