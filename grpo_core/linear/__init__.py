"""The loss from hidden states and output matrix, without materialising the full logits.

Read `chunks.loss_over_chunks` first (the loop), then `workspace` (what chunks share), `loss` and
`logp` (the public functions), `vocab_slices` (the plan without a float32 sum of the matrix).
`matmuls` has the products of a `head`; `model` gives a transformers model a forward with a loss.
"""
