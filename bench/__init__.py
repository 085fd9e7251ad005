"""Benchmarks: time, bytes, matrix products, peak memory and digits of ours and of other libraries.

Read `batch` (inputs and cases), `contenders` (the ways to the loss), `truth` (what is right),
`bench_loss` (what is timed and how), then `table`. `meter` and `kernel_meter` count
bytes; `counted`, `memory`, `trl_head` and `accuracy` are commands that count, `ceilings` and `tune`
are commands for a GPU.
"""
