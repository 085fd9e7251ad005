"""From hidden states: the output matrix is part of the loss, the logits never exist all at once.

Read `chunks.loss_over_chunks` first (the loop), then `loss` (the public functions and the autograd
function), `logp`, and `vocab_slices` (the plan without a float32 sum of the matrix). `matmuls` has
the products of a `head`; `model` computes the loss in a transformers model's own forward.
"""
