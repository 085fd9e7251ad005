"""What the commands run: the embedded task, reinforcement of any model, comparison, plots.

Each command of `grpo_core` is a file of a few lines that calls `main` here.
"""
