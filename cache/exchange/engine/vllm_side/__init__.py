"""What runs inside vLLM's own environment: vLLM's connector for hidden states, and the process that
feeds it prompts. These files import vLLM and nothing of this package, which is not installed there.
"""
