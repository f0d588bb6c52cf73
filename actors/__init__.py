"""Everything that touches ray, vllm or deepspeed: the Ray actors of the four pools."""
