"""vLLM's connector for hidden states, also where there is no accelerator.

vLLM's own one copies through pinned memory, which a CPU lacks. This one refuses layer ids that vLLM
takes without a word, names the layers in each file, and gives a file its name when it is whole.
"""

import fcntl
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from safetensors.torch import save_file
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import (
    ExampleHiddenStatesConnector,
    PendingSave,
    extract_from_kv_cache,
)


class CarryOnConnector(ExampleHiddenStatesConnector):  # type: ignore[misc]  # untyped there
    """Writes `hidden_states` [T, L, D] and `token_ids` [T] of each request to a file."""

    def __init__(self, vllm_config: Any, *others: Any, **named: Any) -> None:  # noqa: ANN401
        """Check the layer ids; arguments are those of vLLM's connector.

        Raises:
            ValueError: layer ids are not ascending, or the model has no such layer.
        """
        super().__init__(vllm_config, *others, **named)
        draft = vllm_config.speculative_config.draft_model_config.hf_config
        layers = list(draft.eagle_aux_hidden_state_layer_ids)
        check_layers(layers, num_layers=vllm_config.model_config.hf_text_config.num_hidden_layers)
        # Both vLLM's code and that below find it on the instance.
        self._write_tensors: Callable[..., None] = partial(write_whole, layers=layers)

    def _submit_async_write(self, pending: PendingSave) -> None:
        cache = self._kv_cache
        if cache.device.type != "cpu":
            super()._submit_async_write(pending)
            return
        if not self._is_tp_rank_zero:
            return
        size = self._block_size
        blocks = torch.tensor(pending.block_ids, dtype=torch.long)
        slots = (torch.arange(size) + blocks[:, None] * size).flatten()
        # copied out of the cache here, as its blocks are used again
        states = extract_from_kv_cache(cache, slots, len(pending.token_ids)).contiguous()
        tensors = {"hidden_states": states, "token_ids": pending.token_ids.clone()}
        lock = self._lock_fds.pop(pending.req_id, None)
        if lock is None and self.use_lock:
            lock = os.open(pending.filename + ".lock", os.O_CREAT | os.O_WRONLY, 0o644)
            fcntl.flock(lock, fcntl.LOCK_EX)
        future = self._executor.submit(
            self._write_tensors, tensors, _COPIED, pending.filename, lock
        )
        self._req_copy_events[pending.req_id] = _COPIED
        self._req_futures[pending.req_id] = future
        future.add_done_callback(partial(self._on_write_done, pending.req_id))


class _Copied:
    """The event of a copy that is finished."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        return


_COPIED = _Copied()


def write_whole(
    tensors: dict[str, torch.Tensor],
    event: Any,  # noqa: ANN401 -- of CUDA
    filename: str,
    lock_fd: int | None,
    *,
    layers: Sequence[int],
) -> None:
    """Write a file under its name once it is whole, with its layer ids; then release its lock.

    Args:
        tensors: of the file.
        event: of the copy that fills them.
        filename: of the file.
        lock_fd: handle of its lock file. None: it has none.
        layers: of the columns.
    """
    try:
        event.synchronize()
        partial_name = f"{filename}.partial"
        metadata = {"layer_ids": " ".join(map(str, layers)), "format": "pt"}
        save_file(tensors, partial_name, metadata=metadata)
        os.rename(partial_name, filename)
    finally:
        if lock_fd is not None:
            os.close(lock_fd)


def check_layers(layers: Sequence[int], *, num_layers: int) -> None:
    """Check layer ids, which vLLM would sort, or replace by another layer, without a word.

    Raises:
        ValueError: they are not ascending, each once, from 0 to `num_layers`.
    """
    ascending = sorted(set(layers))
    if list(layers) != ascending or not layers or not 0 <= layers[0] <= layers[-1] <= num_layers:
        raise ValueError(
            f"eagle_aux_hidden_state_layer_ids: expected ascending ids from 0 to {num_layers}, "
            f"each once, got {list(layers)}"
        )
