"""The demo run: a small corpus about decimals, a base model, R1-Zero, SFT and R1.

Read `decimals` (the task), `config` (the options), `demo` (the stages), `report` (their figures).
"""
