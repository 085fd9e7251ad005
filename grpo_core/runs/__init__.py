"""What the commands run: the demo task, reinforcement learning of any model, comparison, plots.

Read `config` (the options), then `run` (reinforcement of a model) or `demo` (the demo task).
`console` and `plots` show a run, `report` says how it ended; `directory` names the files it writes.
"""
