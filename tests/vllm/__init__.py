"""With the real vLLM 0.32.0 for CPUs: `make test-vllm`. Skipped without it."""
