"""The kernels on the user's device against float64: `python -m grpo_core.verify`.

The truth is `reference_loss` in float64, differentiated by autograd. It shares only the scalar
formulas with the kernels; the test suite compares these with the papers. The error of plain PyTorch
is measured as well. Read `accuracy` (the rule) first, then `inputs`, `checks` and `report`.
"""
