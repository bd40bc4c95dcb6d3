"""Extraction by vLLM: an engine computes the states, run here or served elsewhere.

Requests, retries, and the files of states, which are checked, packed into units and removed. What
imports vLLM is in `vllm_side`, and runs in vLLM's own environment.
"""
