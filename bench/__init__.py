"""Benchmarks: time, bytes, matrix products, peak memory and digits of ours and of other libraries.

Read `batch` (inputs and cases), `contenders` (the ways to the loss), `truth` (what is right),
`bench_loss` (what is timed and how), then `table`. The other modules but `meter` are commands.
"""
