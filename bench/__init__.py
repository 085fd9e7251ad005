"""Benchmarks: what one pass over the logits saves, on the machine at hand."""
