"""The objective: advantage, ratio level, surrogate, KL, aggregation; published methods as values.

Read `objective` first, then `recipes`. `advantage` turns rewards into advantages. `policy_factor`
scales the surrogate of a token, `off_policy` holds its rules for tokens of another policy. `value`
is PPO's value function, `catalogue` the table of methods, `validation` the checks of arguments.
"""
