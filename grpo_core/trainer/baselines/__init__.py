"""What GRPO is compared with, on the same data, rewards and rollouts: SFT, DPO, PPO."""
