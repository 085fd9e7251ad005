"""The compiled kernels, without a GPU: registers, spills, loads, instructions per logit.

Read `compile_ahead` first (compiles), then `sass` and `loops` (read the machine code).
"""
