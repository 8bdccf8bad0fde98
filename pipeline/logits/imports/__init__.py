"""Other people's logits: the layouts they come in, and whose clips their rows are of."""
