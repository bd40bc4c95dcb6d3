"""The lm-eval harness takes the customized model as any other, with a task of one's own."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.tiny_carryons import make_tiny_carryon

from carryon.cache.base.model import Base
from carryon.train.inference.generate_settings import GenerateSettings
from carryon.train.inference.modeling import CarryOnForCausalLM

CHOICES = {
    "task": "tiny_choices",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "choices",
    "doc_to_target": "right",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc"}],
}
TEXTS = {
    "task": "tiny_texts",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 5, "do_sample": False},
    "metric_list": [{"metric": "exact_match"}],
}
QUESTIONS = ["the an", "in the thing", "on"]
CHOICE_TEXTS = [" the", " thing"]


def _log_likelihood(model: CarryOnForCausalLM, text: str, end: str) -> float:
    ids = model.tokenizer(text, return_tensors="pt").input_ids
    whole = model.tokenizer(text + end, return_tensors="pt").input_ids
    with torch.no_grad():
        scores = model(whole).logits.float().log_softmax(-1)
    places = range(ids.shape[1] - 1, whole.shape[1] - 1)
    return sum(float(scores[0, place, whole[0, place + 1]]) for place in places)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what the harness imports warns of its own parts
def test_the_harness_measures_what_the_model_does(
    tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    model: Any = CarryOnForCausalLM(tiny_base, *make_tiny_carryon(tiny_base))
    settings = GenerateSettings(max_new_tokens=5, chat=False)
    preferred = [
        max((0, 1), key=lambda n, q=question: _log_likelihood(model, q, CHOICE_TEXTS[n]))
        for question in QUESTIONS
    ]
    records = [
        {
            "question": question,
            "choices": CHOICE_TEXTS,
            "right": choice if index else 1 - choice,  # the first one is to be wrong
            "answer": model.answer(question, settings=settings) if index != 1 else "no",
        }
        for index, (question, choice) in enumerate(zip(QUESTIONS, preferred, strict=True))
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
    for task in (CHOICES, TEXTS):
        document = {**task, **source, "test_split": "test"}
        (tmp_path / f"{task['task']}.yaml").write_text(yaml.safe_dump(document))

    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=model.tokenizer, batch_size=2),
        tasks=["tiny_choices", "tiny_texts"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )["results"]

    assert found["tiny_choices"]["acc,none"] == pytest.approx(2 / 3)
    assert found["tiny_texts"]["exact_match,none"] == pytest.approx(2 / 3)
