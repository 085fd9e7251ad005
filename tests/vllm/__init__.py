"""With the real vLLM 0.32.0 on a CPU, in an environment of its own: `make test-vllm`. Skipped without it."""
