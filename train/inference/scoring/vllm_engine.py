"""Generation by vLLM, where it is installed: for models that are ordinary checkpoints."""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from carryon.cache.errors import InputError, MissingExtraError
from carryon.train.config import GenerateSettings
from carryon.train.inference.generate import Generation
from carryon.train.inference.prompts import Prompt
from carryon.train.inference.scoring.arms import Arm

Engine = Literal["auto", "transformers", "vllm"]
BATCH_ROWS = 256
"""Answers of a call; vLLM batches them itself."""
_MEMORY_RATIO = 0.9
"""Of the free memory."""


def uses_vllm(arm: Arm, source: str, *, engine: Engine) -> bool:
    """Return whether vLLM answers for an arm whose model is at `source`.

    Raises:
        InputError: it is asked for, and cannot run this arm.
        MissingExtraError: it is asked for, and not installed.
    """
    can_run = arm.is_plain and not source.endswith(".gguf") and "@" not in Path(source).name
    if engine == "transformers" or (engine == "auto" and not can_run):
        return False
    is_there = importlib.util.find_spec("vllm") is not None
    if engine == "vllm" and not can_run:
        raise InputError(
            f"engine: vllm runs bases and merged models in folders or on the hub, got the arm "
            f"{arm.name!r}. Fix: --engine auto"
        )
    if engine == "vllm" and not is_there:
        raise MissingExtraError(
            "engine: vllm needs the package 'vllm', which is not installed: run pip install vllm "
            "in an environment whose torch and transformers it accepts, or --engine transformers"
        )
    return is_there


def open_vllm(
    source: str, *, settings: GenerateSettings, context_tokens: int, dtype: str
) -> Callable[[Sequence[Sequence[int]], int, Sequence[Prompt]], list[Generation]]:
    """Return a function that answers prompts of token ids; the number seeds sampling."""
    vllm: Any = importlib.import_module("vllm")
    given: dict[str, Any] = {"model": source, "dtype": dtype, "max_model_len": context_tokens}
    if torch.cuda.is_available():  # the base may be there too
        free, total = torch.cuda.mem_get_info()
        given["gpu_memory_utilization"] = _MEMORY_RATIO * free / total
    engine = vllm.LLM(**given)

    def answer(
        rows: Sequence[Sequence[int]], seed: int, prompts: Sequence[Prompt]
    ) -> list[Generation]:
        sampling = [
            vllm.SamplingParams(
                max_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                top_p=settings.top_p,
                seed=seed + row,
            )
            for row in range(len(rows))
        ]
        tokens = [{"prompt_token_ids": list(row)} for row in rows]
        results = [each.outputs[0] for each in engine.generate(tokens, sampling, use_tqdm=False)]
        return [
            Generation(
                text=result.text,
                num_tokens=len(result.token_ids),
                is_cut=result.finish_reason == "length",
            )
            for result in results
        ]

    return answer
