"""awareness-vllm: load the KV cache of one model into a vLLM server of another.

Importing this package loads neither torch nor vllm.
"""

__version__ = "0.1.0"
