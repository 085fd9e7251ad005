"""How many digits are right: `measure` runs the contenders, `document` writes docs/accuracy.md."""
