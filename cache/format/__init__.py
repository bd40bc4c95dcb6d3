"""The bytes of a store: Zarr metadata, codecs, quantization, manifest, receipts, probe, head.

Nothing here decides what is read or written when.
"""
