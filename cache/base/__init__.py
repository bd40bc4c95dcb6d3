"""The frozen LLM: loading it, its architecture, its identity, hooks on its hidden states, its head.

Nothing here writes a store.
"""

import logging

# transformers imports torchao where it is installed, which warns of kernels for other devices.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
