"""The objective: advantage, ratio level, surrogate, KL, aggregation; published methods as values.

Read `objective` first, then `recipes`. `advantage` turns rewards into advantages, by the means and
standard deviations of `groups`; `aggregation` weighs tokens. `policy_factor` scales the surrogate
of a token; its rules for tokens of another policy are in `off_policy`. `value` has GAE and the
value loss of PPO, `catalogue` the table of methods, `validation` the checks of arguments.
"""
