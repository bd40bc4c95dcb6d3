"""Names of transformers that are imported without the warnings of torchao.

With these transformers imports torchao where it is installed, which warns of its kernels for other
devices and of what it registers with torch. All of the package import them from here.
"""

from carryon.cache.base.quiet import errors_only

with errors_only("torchao", "torch.utils._pytree"):
    from transformers import AttentionInterface, PreTrainedModel

__all__ = ["AttentionInterface", "PreTrainedModel"]
