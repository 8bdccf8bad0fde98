"""What every command does alike: progress, stopping, the Ray session, recipes, memory.

Knows no clip, no logit and no model.
"""
