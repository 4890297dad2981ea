"""What touches files and vLLM: the boards, and the class that vLLM loads as its device."""
