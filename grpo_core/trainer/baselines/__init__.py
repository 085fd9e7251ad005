"""Baselines on the same data, rewards and rollouts as GRPO: SFT, DPO, PPO.

Read `supervised` first: `dpo` uses its training loop. `ppo` is a subclass of `Trainer`.
"""
