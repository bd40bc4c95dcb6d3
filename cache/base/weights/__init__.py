"""The weights of a base where they lie: safetensors files, host memory, disk.

Loading them is transformers' work (../loading.py); here they are read again, for their digest.
"""
