"""How many digits are right: ours beside PyTorch, Liger and TRL, against float64.

    python -m bench.accuracy

writes the tables of docs/accuracy.md and the plot beside it.
"""
