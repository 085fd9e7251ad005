"""Kernels with choices that only a GPU can decide: a file each, timed by `bench.tune`."""
