"""vLLM as the sampling engine: `engine` in the trainer's process, `server` over HTTP.

Weights go by CUDA IPC, by NCCL, or as files: `files` writes them, `folder` is vLLM's side.
"""

FOLDER_BACKEND = "grpo_folder"  # in vLLM's --weight-transfer-config
