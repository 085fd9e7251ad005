"""From hidden states: the output matrix is part of the loss, the logits never exist at once.

Read `loss` first (the public functions), then `plans` (the loop over chunks). `model` puts the
loss into a transformers model's own forward.
"""
