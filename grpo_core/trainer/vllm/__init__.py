"""vLLM as the sampling engine: `engine` in the trainer's process, `server` over HTTP and NCCL."""
