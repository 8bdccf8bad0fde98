"""The logit store: its parts, stamps, forms and alignment; `imports` takes over other people's logits.

Needs neither torch nor Ray, so that any script may read a store with it.
"""
