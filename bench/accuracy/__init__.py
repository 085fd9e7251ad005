"""How many digits are right, beside PyTorch, Liger and TRL: python -m bench.accuracy.

Measures, and writes the tables of docs/accuracy.md and the picture beside it. `measure` runs the
contenders against float64, `document` writes.
"""
