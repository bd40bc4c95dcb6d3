"""Memory that is used again: when, and when not."""

import gc
import threading

import numpy as np
import torch

from carryon.cache.store.buffers import BufferPool


def address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def test_memory_is_reused_when_its_array_is_gone() -> None:
    pool = BufferPool(max_free=8)
    array = pool.take(1000)
    first = address(array)
    del array
    assert address(pool.take(1000)) == first


def test_memory_is_not_reused_while_a_view_of_it_is_held() -> None:
    pool = BufferPool(max_free=8)
    array = pool.take(1000)
    first = address(array)
    view = array.view(np.uint16)[10:90].reshape(8, 10)[2:]
    del array
    assert address(pool.take(1000)) != first
    tensor = torch.from_numpy(view)[1]
    del view
    assert address(pool.take(1000)) != first
    buffer = tensor.numpy().data
    del tensor
    assert address(pool.take(1000)) != first
    del buffer
    gc.collect()
    several = [pool.take(1000) for _ in range(4)]
    assert first in {address(array) for array in several}


def test_arrays_of_another_size_share_no_memory() -> None:
    pool = BufferPool(max_free=8)
    array = pool.take(1600)
    first = address(array)
    del array
    other = pool.take(1000)
    assert address(other) != first
    assert other.shape == (1000,)
    assert pool.made_bytes == 2600


def test_no_more_than_max_free_blocks_are_kept() -> None:
    pool = BufferPool(max_free=2)
    arrays = [pool.take(1000) for _ in range(4)]
    arrays.clear()
    assert [pool.take(1000).shape for _ in range(4)] == [(1000,)] * 4
    several = [pool.take(1000) for _ in range(4)]
    assert len({address(array) for array in several}) == 4
    assert pool.made_bytes == 6000


def test_an_empty_array_can_be_taken() -> None:
    assert BufferPool(max_free=8).take(0).shape == (0,)


def test_threads_never_share_memory() -> None:
    pool = BufferPool(max_free=8)
    problems: list[int] = []

    def work(number: int) -> None:
        for size in [1000, 1020, 990, 1000] * 50:
            array = pool.take(size)
            array[:] = number
            if not (array == number).all():
                problems.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
