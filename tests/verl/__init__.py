"""With the real verl 0.9.1, in an environment of its own: `make test-verl`. Skipped without it."""
