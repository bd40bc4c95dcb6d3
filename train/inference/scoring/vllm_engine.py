"""Generation by vLLM, in its own environment: for models that are ordinary checkpoints."""

import importlib.util
import json
import logging
import os
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from transformers import PreTrainedTokenizerBase as Tokenizer

from carryon.cache.errors import EngineError, InputError
from carryon.cache.exchange.engine.vllm_process import (
    END_S,
    PYTHON_VARIABLE,
    VllmProcess,
    find_python,
    one_line,
    vllm_environment,
)
from carryon.train.inference.generate import Generation
from carryon.train.inference.generate_settings import GenerateSettings
from carryon.train.inference.prompts import Prompt
from carryon.train.inference.scoring.arms import Arm

logger = logging.getLogger(__name__)

Engine = Literal["auto", "transformers", "vllm"]
BATCH_ROWS = 256
"""Answers of a call; vLLM batches them itself."""
_ANY_TOKEN = 0
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
    if engine == "vllm":
        if not can_run:
            raise InputError(
                f"engine: vllm runs bases and merged models in folders or on the hub, got the arm "
                f"{arm.name!r}. Fix: --engine auto"
            )
        _find_python()
        return True
    return bool(os.environ.get(PYTHON_VARIABLE)) or importlib.util.find_spec("vllm") is not None


def _find_python() -> str:
    return find_python("", what="--engine vllm", fix=f"set {PYTHON_VARIABLE} to")


class VllmAnswers:
    """A process with vLLM that answers; it ends with this object, or with this process."""

    def __init__(
        self,
        source: str,
        *,
        tokenizer: Tokenizer,
        settings: GenerateSettings,
        context_tokens: int,
        dtype: str,
    ) -> None:
        """Start it, and wait until it has answered once: some bases load and cannot be computed.

        Args:
            source: folder of a checkpoint, or its id on the hub.
            tokenizer: of that checkpoint: vLLM leaves out the bytes of a cut character.
            settings: how answers are generated.
            context_tokens: most tokens of a prompt with its answer.
            dtype: that it computes in.

        Raises:
            InputError: CARRYON_VLLM_PYTHON names no program.
            MissingExtraError: vLLM is not installed.
            EngineError: it does not start, or does not answer.
        """
        self._settings, self._tokenizer = settings, tokenizer
        self._process = VllmProcess(_find_python(), driver="carryon_answers.py")
        self._end = weakref.finalize(self, _end, self._process)
        logger.info(f"vLLM starts for {source}, which takes some ten seconds or more")
        engine: dict[str, Any] = {
            "model": source,
            "dtype": dtype,
            "max_model_len": context_tokens,
            "disable_log_stats": True,
            "enforce_eager": not torch.accelerator.is_available(),  # compiling takes a minute
        }
        if torch.cuda.is_available():  # the base may be there too
            free, total = torch.cuda.mem_get_info()
            engine["gpu_memory_utilization"] = _MEMORY_RATIO * free / total
        job = {"environment": vllm_environment(), "engine": engine}
        self._ask(job | {"temporary": str(self._process.temporary)}, "version", verb="start")
        self._answer([[_ANY_TOKEN]], seed=0, max_new_tokens=1)

    def __call__(
        self, rows: Sequence[Sequence[int]], seed: int, prompts: Sequence[Prompt]
    ) -> list[Generation]:
        """Answer prompts of token ids; the number seeds sampling.

        Raises:
            EngineError: vLLM has ended, or does not take a prompt.
        """
        answers = self._answer(rows, seed=seed, max_new_tokens=self._settings.max_new_tokens)
        new = [[int(token) for token in tokens] for tokens, _ in answers]
        texts: list[str] = self._tokenizer.batch_decode(new, skip_special_tokens=True)
        return [
            Generation(text=text, num_tokens=len(tokens), is_cut=bool(is_cut))
            for text, tokens, (_, is_cut) in zip(texts, new, answers, strict=True)
        ]

    def _answer(self, rows: Sequence[Sequence[int]], *, seed: int, max_new_tokens: int) -> Any:  # noqa: ANN401
        """Return the new tokens of each row, and whether they were cut."""
        request = {
            "rows": [list(row) for row in rows],
            "seeds": [seed + row for row in range(len(rows))],
            "sampling": {
                "max_tokens": max_new_tokens,
                "temperature": self._settings.temperature,
                "top_p": self._settings.top_p,
            },
        }
        answers = self._ask(request, "answers", verb="answer")
        if len(answers) != len(rows):
            self._fail(f"expected {len(rows)} answers, got {len(answers)}")
        return answers

    def close(self) -> None:
        """End the process."""
        self._end()

    def _ask(self, message: Mapping[str, Any], name: str, *, verb: str) -> Any:  # noqa: ANN401
        """Send a line and return the field `name` of the line that comes back."""
        line = b""
        try:
            self._process.say(message)
            line = self._process.lines.readline()
            said = json.loads(line)
            if "error" in said:
                raise EngineError(
                    f"vLLM: expected it to take a prompt, got {one_line(said['error'])}. Fix: "
                    "shorter prompts, or --engine transformers"
                )
            return said[name]
        except (BrokenPipeError, ValueError, KeyError, TypeError):
            self._fail(f"expected an answer, got {line!a:.80}" if line else "", verb=verb)

    def _fail(self, problem: str, *, verb: str = "answer") -> NoReturn:
        """End the process and say why; its log is left."""
        self._end.detach()
        if problem:
            self._process.kill()  # before it removes its log
        self._process.end(after_s=END_S)
        self._process.lines.close()
        self._process.clear(keeps_log=True)
        problem = problem or f"did not {verb}, and ended with code {self._process.code}"
        raise EngineError(
            f"vLLM: {problem}: {self._process.last_word()}. Fix: see {self._process.log}, or "
            "--engine transformers"
        )


def _end(process: VllmProcess) -> None:
    process.end(after_s=END_S)
    process.lines.close()
    process.clear(keeps_log=False)
