"""vLLM as the sampling engine: in the trainer's process, or as a server."""
