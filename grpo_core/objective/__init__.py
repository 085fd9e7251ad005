"""What is minimised: five axes, and the published methods as values of them.

Read `objective` first, then `recipes`. `advantage` and `estimators` turn rewards into advantages;
`policy_factor` and what it reads correct for a sampler that differs from the policy; `value` is
PPO's other half; `catalogue` prints all methods.
"""
