"""The objective: advantage, ratio level, surrogate, KL, aggregation; published methods as values.

Read `objective` first, then `recipes`. `advantage` turns rewards into advantages, by the means and
standard deviations of `groups`; `aggregation` weighs tokens. `policy_factor` scales the surrogate
of a token; its corrections for tokens that another policy sampled are in `off_policy`. `value` has
GAE and PPO's value loss, `catalogue` the table of methods, `validation` the checks of arguments.
"""
