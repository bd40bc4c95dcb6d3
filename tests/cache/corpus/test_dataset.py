"""Records as samples: tokens, targets, character ends, limits, counts, fingerprint.

The tokenizer has a token for each byte and a few merges, so every expected value can be counted by
hand. Shown as text, a space is \u0120 and a newline \u010a.
"""

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from carryon.cache.corpus.conversion import Converter
from carryon.cache.corpus.dataset import Corpus, Sample, read_corpus
from carryon.cache.corpus.report import LOST_HELD_OUT, warnings
from carryon.cache.errors import DiskFullError, InputError, MissingError
from carryon.cache.settings import CorpusSettings, DataSettings

TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] + '\\n' + m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
REWRITING_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}think {% endif %}{{ m['content'] }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
MERGES = [("a", "b"), ("\u010a", "\u010a"), ("\u0120", "a"), ("\u010a", "\u0120")]
SPECIAL = ["<s>", "</s>", "<|start|>", "<|end|>"]

HI_YO = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
TWO_TURNS = [*HI_YO, {"role": "user", "content": "x"}, {"role": "assistant", "content": "z"}]


def test_each_assistant_turn_through_its_end_of_turn_token_is_a_target(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    sample = read_one(tmp_path, {"messages": HI_YO}, tokenizer)
    # <|start|> user\n hi <|end|> \n <|start|> assistant\n yo <|end|> \n, one token a character
    assert spell(tokenizer, sample.tokens) == [
        *("<|start|>", "u", "s", "e", "r", "\u010a", "h", "i", "<|end|>", "\u010a"),
        *("<|start|>", *"assistant", "\u010a", "y", "o", "<|end|>", "\u010a"),
    ]
    assert sample.loss_mask.tolist() == [0] * 21 + [1] * 3 + [0]
    assert sample.char_end.tolist() == [
        *(9, 10, 11, 12, 13, 14, 15, 16, 23, 24),
        *(33, *range(34, 43), 43, 44, 45, 52, 53),
    ]
    assert re.fullmatch(r"data-[0-9a-f]{8}-1", sample.id)
    assert not sample.is_held_out
    dtypes = [array.dtype for array in (sample.tokens, sample.loss_mask, sample.char_end)]
    assert dtypes == [np.int32, np.uint8, np.int32]


TURN = "{% for m in messages %}<|start|>{{ m['role'] + '\\n' + m['content'] }}"
PROMPT = "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"


@dataclass(frozen=True)
class Closed:
    id: str
    template: str
    answers: list[str]
    targets: str


CLOSED = [
    Closed("newline", TURN + "<|end|>\n{% endfor %}" + PROMPT, ["yo", "z"], "yo<|end|>z<|end|>"),
    Closed("nothing", TURN + "<|end|>{% endfor %}" + PROMPT, ["yo", "z"], "yo<|end|>z<|end|>"),
    Closed("blanks", TURN + " <|end|> \n\n{% endfor %}" + PROMPT, ["yo"], "yo <|end|>"),
    Closed(  # as Phi-3: an end-of-text token after a finished conversation
        "end of text too",
        TURN + "<|end|>\n{% endfor %}{% if not add_generation_prompt %}</s>{% endif %}" + PROMPT,
        ["yo"],
        "yo<|end|>",
    ),
    Closed("no token", TURN + "\n\n{% endfor %}" + PROMPT, ["yo", "z"], "yo\n\nz\n\n"),
    Closed(
        "named inside", TURN + "<|end|>\n{% endfor %}" + PROMPT, ["a<|end|>b "], "a<|end|>b <|end|>"
    ),
]


@pytest.mark.parametrize("case", CLOSED, ids=lambda case: case.id)
def test_text_after_the_end_of_turn_token_is_no_target(case: Closed, tmp_path: Path) -> None:
    messages = [
        message
        for answer in case.answers
        for message in (HI_YO[0], {"role": "assistant", "content": answer})
    ]
    tokenizer = make_tokenizer(template=case.template)
    sample = read_one(tmp_path, {"messages": messages}, tokenizer)
    assert tokenizer.decode(sample.tokens[sample.loss_mask == 1]) == case.targets
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(sample.tokens) == whole  # the tokens are unchanged


@dataclass(frozen=True)
class Masked:
    id: str
    mask: Literal["auto", "assistant", "completion", "all"]
    record: dict[str, Any]
    targets: str


MASKED = [
    Masked("messages_auto", "auto", {"messages": TWO_TURNS}, "yo<|end|>z<|end|>"),
    Masked("messages_assistant", "assistant", {"messages": TWO_TURNS}, "yo<|end|>z<|end|>"),
    Masked("messages_completion", "completion", {"messages": TWO_TURNS}, "z<|end|>"),
    Masked(
        "messages_all",
        "all",
        {"messages": HI_YO},
        "user\nhi<|end|>\n<|start|>assistant\nyo<|end|>\n",
    ),
    Masked("pair_auto", "auto", {"prompt": "hi", "completion": "yo"}, "yo</s>"),
    Masked("pair_completion", "completion", {"prompt": "hi", "completion": "yo"}, "yo</s>"),
    Masked("pair_all", "all", {"prompt": "hi", "completion": "yo"}, "hiyo</s>"),
    Masked("text_auto", "auto", {"text": "hi yo"}, "hi yo</s>"),
    Masked("text_all", "all", {"text": "hi yo"}, "hi yo</s>"),
]


@pytest.mark.parametrize("case", MASKED, ids=lambda case: case.id)
def test_the_mask_setting_selects_the_targets(case: Masked, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    sample = read_one(tmp_path, case.record, tokenizer, CorpusSettings(mask=case.mask))
    targets = sample.tokens[sample.loss_mask == 1]
    assert tokenizer.decode(targets) == case.targets
    assert sample.loss_mask[0] == 0


@dataclass(frozen=True)
class Misfit:
    id: str
    mask: Literal["assistant", "completion"]
    record: dict[str, Any]
    message: str


MISFITS = [
    Misfit(
        "pair",
        "assistant",
        {"prompt": "a", "completion": "b"},
        r"data\.jsonl:1: mask 'assistant' does not fit prompt and completion: "
        r"expected auto or completion or all",
    ),
    Misfit("text", "assistant", {"text": "a"}, r"'assistant' does not fit text: .* auto or all"),
    Misfit(
        "text_2", "completion", {"text": "a"}, r"'completion' does not fit text: .* auto or all"
    ),
]


@pytest.mark.parametrize("case", MISFITS, ids=lambda case: case.id)
def test_a_mask_that_does_not_fit_a_record_is_refused(case: Misfit, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=case.message):
        read_one(tmp_path, case.record, make_tokenizer(), CorpusSettings(mask=case.mask))


def test_prompt_and_completion_are_tokenized_as_in_generation(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    sample = read_one(tmp_path, {"prompt": "xa", "completion": "b a"}, tokenizer)
    prompt = tokenizer("xa")["input_ids"]
    assert sample.tokens[: len(prompt)].tolist() == prompt
    # "a" and "b" would be one token in one text
    assert spell(tokenizer, sample.tokens) == ["<s>", "x", "a", "b", "\u0120a", "</s>"]
    assert sample.char_end.tolist() == [0, 1, 2, 3, 5, 5]
    assert sample.loss_mask.tolist() == [0, 0, 0, 1, 1, 1]


def test_an_end_token_that_the_tokenizer_adds_is_not_doubled(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(frame="<s> <|start|> $A </s>")
    sample = read_one(tmp_path, {"text": "ab"}, tokenizer)
    assert spell(tokenizer, sample.tokens) == ["<s>", "<|start|>", "ab", "</s>"]
    assert sample.loss_mask.tolist() == [0, 0, 1, 1]


def test_without_a_start_token_the_first_token_of_a_text_is_no_target(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(frame="$A")
    sample = read_one(tmp_path, {"text": "ab x"}, tokenizer)
    assert spell(tokenizer, sample.tokens) == ["ab", "\u0120", "x", "</s>"]
    assert sample.loss_mask.tolist() == [0, 1, 1, 1]


def test_every_token_of_a_character_ends_where_the_character_ends(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    # 1, 2, 4, 3 and 1 bytes; the thumb and its skin tone are 4 and 4 bytes
    text = "a\u00e9\U0001f600\u65e5b\U0001f44d\U0001f3fd"
    sample = read_one(tmp_path, {"text": text}, tokenizer)
    assert sample.char_end.tolist() == [
        *(0, 1, 2, 2, 3, 3, 3, 3, 4, 4, 4, 5),
        *(6, 6, 6, 6, 7, 7, 7, 7, 7),
    ]


def test_all_tokens_of_one_character_are_targets(tmp_path: Path) -> None:
    messages = [HI_YO[0], {"role": "assistant", "content": "\U0001f600"}]
    sample = read_one(tmp_path, {"messages": messages}, make_tokenizer())
    assert sample.loss_mask.tolist() == [0] * 21 + [1] * 5 + [0]
    assert sample.char_end[-6:].tolist() == [44, 44, 44, 44, 51, 52]


def test_no_token_reaches_from_the_prompt_into_a_turn(tmp_path: Path) -> None:
    messages = [HI_YO[0], {"role": "assistant", "content": "\n\nyo"}]
    tokenizer = make_tokenizer()
    sample = read_one(tmp_path, {"messages": messages}, tokenizer)
    # in one text the newline of "assistant\n" and the answer's first would be one token
    targets = sample.tokens[sample.loss_mask == 1]
    assert spell(tokenizer, targets) == ["\u010a", "\u010a", "y", "o", "<|end|>"]
    assert spell(tokenizer, sample.tokens)[19:21] == ["t", "\u010a"]


def test_character_ends_are_those_of_the_text_where_the_tokenizer_trims_blanks(
    tmp_path: Path,
) -> None:
    tokenizer = make_tokenizer()
    trimming = processors.ByteLevel(trim_offsets=True)
    tokenizer.backend_tokenizer.post_processor = trimming
    text = "x\n  a"  # tokens "x", newline and space, " a"
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    assert offsets == [(0, 1), (1, 2), (4, 5)]
    sample = read_one(tmp_path, {"text": text}, tokenizer)
    assert sample.char_end.tolist() == [1, 3, 5, 5]
    assert isinstance(tokenizer.backend_tokenizer.post_processor, processors.ByteLevel)


def test_character_ends_never_decrease_and_cover_the_text(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    letters = np.array(list("ab \n\t.\u00e9\u0301\u65e5\U0001f600\u200d\U0001f469"))
    texts = ["".join(rng.choice(letters, size=30)) for _ in range(50)]
    path = write_lines(tmp_path / "data.jsonl", *({"text": text} for text in texts))
    tokenizer = make_tokenizer()
    for text, sample in zip(texts, read([path], tokenizer).samples, strict=True):
        assert sample.tokens[1:-1].tolist() == tokenizer.encode(text)[1:]
        assert (np.diff(sample.char_end) >= 0).all()
        assert sample.char_end[-1] == len(text)
        for row, end in enumerate(sample.char_end.tolist()):
            seen = str(tokenizer.decode(sample.tokens[1 : row + 1]))
            if not seen.endswith("\ufffd"):  # whole characters so far
                assert row == len(sample.tokens) - 1 or seen == text[:end]


def test_truncation_and_padding_set_on_the_tokenizer_have_no_effect(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer("hi yo", truncation=True, max_length=2)
    tokenizer(["a", "hi"], padding="max_length", max_length=9)
    assert tokenizer.backend_tokenizer.padding is not None
    sample = read_one(tmp_path, {"text": "hi yo"}, tokenizer)
    assert spell(tokenizer, sample.tokens) == ["<s>", "h", "i", "\u0120", "y", "o", "</s>"]


@dataclass(frozen=True)
class Long:
    id: str
    long: Literal["auto", "truncate", "split"]
    samples: list[tuple[str, str, list[int], list[int]]]
    losses: list[tuple[str, int, int]]


# "<s>xyz</s>" is 5 tokens and the limit 3, "hi" with its frame 4
LONG = [
    Long(
        "truncate",
        "truncate",
        [
            ("long", "<s>xy", [0, 1, 1], [0, 1, 2]),
            ("two", "<s>hi", [0, 1, 1], [0, 1, 2]),
        ],
        [("too long, cut off", 2, 3)],
    ),
    Long(
        "split",
        "split",
        [
            ("long#0", "<s>xy", [0, 1, 1], [0, 1, 2]),
            ("long#1", "<s>z</s>", [0, 1, 1], [2, 3, 3]),
            ("two#0", "<s>hi", [0, 1, 1], [0, 1, 2]),
            ("two#1", "<s></s>", [0, 1], [2, 2]),
        ],
        [("split into pieces", 2, 0)],
    ),
]
LONG.append(Long("auto", "auto", LONG[1].samples, LONG[1].losses))


@pytest.mark.parametrize("case", LONG, ids=lambda case: case.id)
def test_long_texts_are_cut_and_counted(case: Long, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    rows = [{"text": "xyz", "id": "long"}, {"text": "hi", "id": "two"}]
    path = write_lines(tmp_path / "data.jsonl", *rows)
    corpus = read([path], tokenizer, CorpusSettings(long=case.long), max_tokens=3)
    samples = [
        (
            sample.id,
            tokenizer.decode(sample.tokens),
            sample.loss_mask.tolist(),
            sample.char_end.tolist(),
        )
        for sample in corpus.samples
    ]
    assert samples == case.samples
    assert len({sample.group for sample in corpus.samples}) == 2  # one a record
    assert losses(corpus) == case.losses


def test_pieces_may_begin_without_start_tokens(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "data.jsonl", {"text": "xyzxy"})
    settings = CorpusSettings(start_pieces=False)
    tokenizer = make_tokenizer()
    corpus = read([path], tokenizer, settings, max_tokens=3)
    texts = [tokenizer.decode(sample.tokens) for sample in corpus.samples]
    assert texts == ["<s>xy", "zxy"]  # the last piece, </s> alone, has no target


def test_long_samples_are_left_out_and_counted_by_long_skip(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "data.jsonl", {"text": "xyz"}, {"text": "hi", "id": "two"})
    corpus = read([path], make_tokenizer(), CorpusSettings(long="skip"), max_tokens=4)
    assert [sample.id for sample in corpus.samples] == ["two"]
    assert corpus.counts == {"records": 2, "samples": 1, "tokens": 4, "supervised_tokens": 3}
    assert losses(corpus) == [("too long, left out", 1, 5)]


def test_a_long_sample_is_refused_with_its_size_by_long_error(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "data.jsonl", {"text": "hi"}, {"text": "xyz", "id": "mine"})
    text = r"data\.jsonl:2: sample 'mine': expected at most 4 tokens, got 5: "
    with pytest.raises(InputError, match=text):
        read([path], make_tokenizer(), CorpusSettings(long="error"), max_tokens=4)


def test_a_sample_whose_targets_are_cut_off_is_left_out_and_counted(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "data.jsonl",
        {"prompt": "hixyz", "completion": "a"},
        {"prompt": "h", "completion": "xyz", "id": "kept"},
        {"prompt": "h", "completion": ""},  # to answer nothing is not learned
    )
    corpus = read([path], make_tokenizer(), max_tokens=5)
    assert [sample.id for sample in corpus.samples] == ["kept"]
    assert corpus.counts == {"records": 3, "samples": 1, "tokens": 5, "supervised_tokens": 3}
    # 8 and 6 tokens, each cut to 5, of which the first has no target left
    assert losses(corpus) == [("too long, cut off", 2, 4), ("no target", 2, 5)]


def test_a_corpus_without_any_target_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "data.jsonl", {"messages": HI_YO[:1]})
    with pytest.raises(InputError, match=r"targets, got none in 1 records \(no target: 1\)\. Fix"):
        read([path], make_tokenizer(), CorpusSettings(long="skip"), max_tokens=10)


def test_an_empty_corpus_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "data.jsonl")
    with pytest.raises(
        InputError, match=r"expected at least one record, got none in .*data\.jsonl"
    ):
        read([path], make_tokenizer())
    with pytest.raises(InputError, match=r"expected at least one record, got none in no file"):
        read([], make_tokenizer())
    with pytest.raises(MissingError, match=r"gone\.txt: no such file"):
        read([tmp_path / "gone.txt"], make_tokenizer())


def test_a_limit_without_room_for_a_target_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "data.jsonl", {"text": "a"})
    with pytest.raises(InputError, match="max_tokens: expected 2 or more tokens, got 1"):
        read([path], make_tokenizer(), max_tokens=1)


def test_a_piece_may_not_have_the_id_of_a_record(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "data.jsonl", {"text": "xyzxyz", "id": "a"}, {"text": "x", "id": "a#1"}
    )
    with pytest.raises(InputError, match=r"data\.jsonl:2: id 'a#1': expected .*data\.jsonl:1"):
        read([path], make_tokenizer(), CorpusSettings(long="split"), max_tokens=4)


def test_two_records_of_one_id_are_refused_with_their_places(tmp_path: Path) -> None:
    rows = [{"text": "x", "id": "a"}, {"text": "y"}, {"text": "z", "id": "a"}]
    path = write_lines(tmp_path / "data.jsonl", *rows)
    with pytest.raises(InputError, match=r"data\.jsonl:3: id 'a': expected .*data\.jsonl:1"):
        read([path], make_tokenizer())


def test_held_out_records_make_held_out_samples(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "data.jsonl", {"text": "a"}, {"text": "xyzxyz", "split": "held-out"}
    )
    corpus = read([path], make_tokenizer(), CorpusSettings(long="split"), max_tokens=4)
    assert [sample.is_held_out for sample in corpus.samples] == [False, True, True, True]


def test_samples_of_one_split_group_are_of_one_group(tmp_path: Path) -> None:
    rows = [{"text": text, "kind": kind} for text, kind in zip("abcd", "uvuv", strict=True)]
    path = write_lines(tmp_path / "data.jsonl", *rows, {"text": "xyzxyz", "kind": "u"})
    settings = CorpusSettings(long="split")
    grouped = DataSettings(column=["split_group=kind"])
    corpus = read([path], make_tokenizer(), settings, max_tokens=4, data_settings=grouped)
    numbers = [sample.group for sample in corpus.samples]
    assert len(numbers) == 7
    assert [numbers.index(each) for each in numbers] == [0, 1, 0, 1, 0, 0, 0]
    plain = read([path], make_tokenizer(), settings, max_tokens=4)
    numbers = [sample.group for sample in plain.samples]
    assert [numbers.index(each) for each in numbers] == [0, 1, 2, 3, 4, 4, 4]


def test_the_fingerprint_is_that_of_the_samples_in_order(tmp_path: Path) -> None:
    first, second = {"text": "xa", "id": "1"}, {"text": "xb", "id": "2"}
    variants: list[list[dict[str, Any]]] = [
        [first, second],
        [second, first],
        [first],
        [first, {**second, "id": "3"}],
        [first, {**second, "text": "xc"}],
        [first, {**second, "split": "held-out"}],
        [{"prompt": "x", "completion": "b", "id": "2"}],
    ]
    tokenizer, fingerprints = make_tokenizer(), []
    for number, rows in enumerate(variants):
        path = write_lines(tmp_path / f"data{number}.jsonl", *rows)
        fingerprints.append(read([path], tokenizer).fingerprint)
        assert read([path], tokenizer).fingerprint == fingerprints[-1]
    assert len(set(fingerprints)) == len(variants)
    assert all(len(bytes.fromhex(fingerprint)) == 32 for fingerprint in fingerprints)


def test_files_are_described_in_order(tmp_path: Path) -> None:
    paths = [write_lines(tmp_path / f"{name}.jsonl", {"text": f"h{name}"}) for name in ("b", "a")]
    corpus = read(paths, make_tokenizer())
    assert [(file["name"], file["bytes"]) for file in corpus.files] == [
        ("b.jsonl", 15),
        ("a.jsonl", 15),
    ]
    assert [sample.id[:2] for sample in corpus.samples] == ["b-", "a-"]


def test_shards_are_read_by_processes_in_order(tmp_path: Path) -> None:
    # 3 MB of a field that is ignored: two of these lines make a shard
    rows = [{"text": f"{letter}ab", "note": " " * 3_000_000} for letter in "vwxyz"]
    path = write_lines(tmp_path / "data.jsonl", *rows)
    tokenizer = make_tokenizer()
    corpora = [
        read_corpus(
            [path],
            tokenizer,
            settings=CorpusSettings(),
            data_settings=DataSettings(tokenizer_workers=workers),
            max_tokens=9,
            folder=tmp_path / f"cache{workers}",
        )
        for workers in (1, 2)
    ]
    for corpus in corpora:
        texts = [tokenizer.decode(sample.tokens) for sample in corpus.samples]
        assert texts == [f"<s>{letter}ab</s>" for letter in "vwxyz"]
        assert [sample.id[-1] for sample in corpus.samples] == list("12345")
    assert corpora[0].fingerprint == corpora[1].fingerprint


def test_a_fault_in_a_process_is_the_error_of_the_call(tmp_path: Path) -> None:
    rows = [{"text": "ab", "note": " " * 5_000_000}, {"text": "ab"}, {"text": 7}]
    path = write_lines(tmp_path / "data.jsonl", *rows)
    with pytest.raises(InputError, match=r"data\.jsonl:3: text: expected"):
        read([path], make_tokenizer())
    assert not list((tmp_path / "cache").rglob("*.partial*"))


def test_a_second_reading_of_the_same_data_finds_the_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_lines(tmp_path / "data.jsonl", {"text": "xa", "id": "1"})
    tokenizer = make_tokenizer()
    first = read([path], tokenizer)

    def fail(*_: object) -> None:
        raise AssertionError("tokenized again")

    with monkeypatch.context() as patch:
        patch.setattr(Converter, "convert", fail)
        again = read([path], tokenizer)
        assert (again.fingerprint, again.counts) == (first.fingerprint, first.counts)
        with pytest.raises(AssertionError, match="tokenized again"):
            read([path], tokenizer, max_tokens=99)
    # a file of the cache that was cut off is made again
    (shard,) = (tmp_path / "cache" / "samples").glob("*/000000.arrow")
    shard.write_bytes(shard.read_bytes()[:-9])
    assert read([path], tokenizer).fingerprint == first.fingerprint


@pytest.mark.parametrize("name", ["data.jsonl", "data.csv"])
def test_a_cache_that_cannot_be_written_is_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text('{"text": "ab"}\n' if name == "data.jsonl" else "text\nab\n")
    with pytest.raises(DiskFullError, match=r"the cache of samples cannot be written.*CARRYON_CAC"):
        read_corpus(
            [tmp_path / name],
            make_tokenizer(),
            settings=CorpusSettings(),
            max_tokens=9,
            folder=Path("/proc/none"),
        )


def test_a_cache_that_another_process_made_meanwhile_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_lines(tmp_path / "data.jsonl", {"text": "ab", "id": "a"})
    rename = Path.rename

    def come_second(self: Path, target: Path) -> Path:
        shutil.copytree(self, target)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", come_second)
    assert [sample.id for sample in read([path], make_tokenizer()).samples] == ["a"]


def test_half_made_samples_of_a_killed_process_are_removed_a_day_later(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "samples"
    for name, age_s in (("old.partial-x", 90_000.0), ("new.partial-y", 60.0)):
        (folder / name).mkdir(parents=True)
        then = time.time() - age_s
        os.utime(folder / name, (then, then))
    read([write_lines(tmp_path / "data.jsonl", {"text": "ab"})], make_tokenizer())
    assert [path.name for path in folder.glob("*.partial-*")] == ["new.partial-y"]


def test_a_killed_process_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": "ab", "note": " " * 2_000_000} for _ in range(3)]
    path = write_lines(tmp_path / "data.jsonl", *rows)
    monkeypatch.setattr(Converter, "convert", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(
        InputError, match="a process that tokenizes was killed.*--tokenizer-workers 1"
    ):
        read_corpus(
            [path],
            make_tokenizer(),
            settings=CorpusSettings(),
            data_settings=DataSettings(tokenizer_workers=2),
            max_tokens=9,
            folder=tmp_path / "cache",
        )


@pytest.mark.parametrize(
    "record", [{"text": ""}, {"text": " \n"}, {"prompt": "a", "completion": " "}]
)
def test_to_write_nothing_and_stop_is_not_learned(record: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"got none in 1 records \(no target: 1\)"):
        read([write_lines(tmp_path / "data.jsonl", record)], make_tokenizer())


def test_bad_rows_are_refused_or_listed(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "ab", "id": "a"}\n{"text": 7}\n{"tex\n')
    tokenizer = make_tokenizer()
    with pytest.raises(InputError, match=r"data\.jsonl:2: text: expected a string"):
        read([path], tokenizer)
    corpus = read([path], tokenizer, data_settings=DataSettings(bad_rows="skip"))
    assert [sample.id for sample in corpus.samples] == ["a"]
    assert losses(corpus) == [("bad row", 2, 0)]
    assert [row["where"] for row in corpus.skipped] == [f"{path}:2", f"{path}:3"]
    assert "malformed JSON" in corpus.skipped[1]["problem"]
    assert any("bad row: 2 of 3 records" in line for line in warnings(corpus.report))


def test_a_template_that_rewrites_earlier_turns_makes_a_sample_of_each(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(template=REWRITING_TEMPLATE)
    path = write_lines(tmp_path / "data.jsonl", {"messages": TWO_TURNS, "id": "chat"})
    corpus = read([path], tokenizer)
    assert [sample.id for sample in corpus.samples] == ["chat@1", "chat@3"]
    assert len({sample.group for sample in corpus.samples}) == 1
    assert [
        tokenizer.decode(sample.tokens[sample.loss_mask == 1]) for sample in corpus.samples
    ] == [
        "think yo<|end|>",
        "think z<|end|>",
    ]
    prompt = "<|start|>user\nhi<|end|>\n<|start|>assistant\nyo<|end|>\n<|start|>user\nx<|end|>\n"
    assert str(tokenizer.decode(corpus.samples[1].tokens)).startswith(prompt)
    note = "one sample per turn, as the chat template rewrites earlier turns"
    assert (note, 1, 0) in losses(corpus)


@pytest.mark.parametrize(
    "settings", [CorpusSettings(mask="completion"), CorpusSettings(turns="last")]
)
def test_the_last_turn_alone_can_be_learned(settings: CorpusSettings, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(template=REWRITING_TEMPLATE)
    sample = read_one(tmp_path, {"messages": TWO_TURNS}, tokenizer, settings)
    assert tokenizer.decode(sample.tokens[sample.loss_mask == 1]) == "think z<|end|>"


def test_of_turns_whose_prompts_fill_a_sample_the_rest_is_counted(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(template=REWRITING_TEMPLATE)
    path = write_lines(tmp_path / "data.jsonl", {"messages": TWO_TURNS * 9})
    corpus = read([path], tokenizer, max_tokens=60)
    assert len(corpus.samples) == 2
    assert ("prompt longer than a sample", 1, 0) in losses(corpus)
    assert ("turn left out, its prompt longer than a sample", 16, 0) in losses(corpus)


def test_a_long_conversation_has_the_targets_of_a_short_one(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    messages = [
        {"role": role, "content": f"{role[0]}{number}"}
        for number in range(300)
        for role in ("user", "assistant")
    ]
    system = {"role": "system", "content": "be brief"}
    for head in ([], [system]):
        path = write_lines(tmp_path / "data.jsonl", {"messages": [*head, *messages]})
        corpus = read([path], tokenizer, max_tokens=20_000)
        (sample,) = corpus.samples
        expected = "".join(f"a{number}<|end|>" for number in range(300))
        assert tokenizer.decode(sample.tokens[sample.loss_mask == 1]) == expected


def test_a_long_conversation_of_a_template_that_rewrites_turns_is_noticed(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(template=REWRITING_TEMPLATE)
    path = write_lines(tmp_path / "data.jsonl", {"messages": TWO_TURNS * 20})
    corpus = read([path], tokenizer, max_tokens=20_000)
    assert len(corpus.samples) == 40
    assert all((sample.loss_mask == 1).sum() in (8, 9) for sample in corpus.samples)


def test_a_preference_pair_is_two_samples_of_one_group(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    row = {"prompt": HI_YO[:1], "chosen": HI_YO[1:], "rejected": [{**HI_YO[1], "content": "no"}]}
    path = write_lines(tmp_path / "data.jsonl", {**row, "id": "pair"})
    corpus = read([path], tokenizer)
    assert [(sample.id, sample.role) for sample in corpus.samples] == [
        ("pair/chosen", 1),
        ("pair/rejected", 2),
    ]
    assert len(set(corpus.samples.groups.tolist())) == 1
    targets = [tokenizer.decode(sample.tokens[sample.loss_mask == 1]) for sample in corpus.samples]
    assert targets == ["yo<|end|>", "no<|end|>"]
    assert corpus.kinds == {"preference pair": 2}


DROPPING_TEMPLATE = TEMPLATE.replace("in messages %}", "in messages if m['role'] != 'system' %}")


def test_a_template_that_drops_a_message_is_refused_or_counted(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(template=DROPPING_TEMPLATE)
    # "i" stands in the rendering, but not as this message
    rows = [
        {"messages": [{"role": "system", "content": "i"}, *HI_YO]},
        {"messages": HI_YO, "id": "kept"},
    ]
    path = write_lines(tmp_path / "data.jsonl", *rows)
    with pytest.raises(
        InputError,
        match=r"data\.jsonl:1: messages\[0\]: the chat template of tiny does not write the content "
        r"of this system message\. Fix: --chat-template FILE .*--drop-unfit",
    ):
        read([path], tokenizer)
    corpus = read([path], tokenizer, data_settings=DataSettings(drop_unfit=True))
    assert [sample.id for sample in corpus.samples] == ["kept"]
    assert losses(corpus) == [("unfit for the chat template", 1, 0)]


def test_a_template_of_a_vision_model_is_given_contents_as_parts(tmp_path: Path) -> None:
    content = "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}"
    tokenizer = make_tokenizer(template=TEMPLATE.replace(" + m['content'] }}", " }}" + content))
    sample = read_one(tmp_path, {"messages": HI_YO}, tokenizer)
    assert tokenizer.decode(sample.tokens[sample.loss_mask == 1]) == "yo<|end|>"


def test_a_turn_that_a_template_does_not_mark_is_counted(tmp_path: Path) -> None:
    marked = "{% generation %}{{ m['content'] }}<|end|>{% endgeneration %}\n"
    plain = "{{ m['content'] }}<|end|>\n"
    text = f"{{% if loop.last %}}{marked}{{% else %}}{plain}{{% endif %}}"
    template = TEMPLATE.replace(" + m['content'] }}<|end|>\n", " }}" + text)
    tokenizer = make_tokenizer(template=template)
    path = write_lines(tmp_path / "data.jsonl", {"messages": TWO_TURNS})
    corpus = read([path], tokenizer)
    (sample,) = corpus.samples
    assert tokenizer.decode(sample.tokens[sample.loss_mask == 1]) == "z<|end|>"
    assert ("turn that the chat template does not mark, not learned", 1, 0) in losses(corpus)


def test_a_target_without_an_end_token_is_a_warning(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer = make_tokenizer(template=template)
    path = write_lines(tmp_path / "data.jsonl", {"messages": HI_YO})
    corpus = read([path], tokenizer)
    assert any("target without an end token" in line for line in warnings(corpus.report))
    assert not warnings(read([path], make_tokenizer()).report)


def test_start_and_end_tokens_in_a_text_are_not_added_again(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    for record in ({"text": "<s>ab</s>"}, {"prompt": "<s>a", "completion": "b</s>"}):
        sample = read_one(tmp_path, record, tokenizer)
        assert tokenizer.decode(sample.tokens) == "<s>ab</s>"
        assert sample.loss_mask[-1] == 1


def test_a_token_beyond_the_embedding_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "data.jsonl", {"text": "ab", "id": "mine"})
    tokenizer = make_tokenizer()
    with pytest.raises(
        InputError, match=r"data\.jsonl:1: sample 'mine': token .* below 200, the rows"
    ):
        read_corpus([path], tokenizer, settings=CorpusSettings(), max_tokens=9, vocab_size=200)


def test_a_text_in_windows_has_the_tokens_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    words = ["ab", "a", "  b", "\n\n", "\u00e9\u65e5", "x" * 300, "\t", "y."]
    text = " ".join(rng.choice(words, size=3000))
    tokenizer = make_tokenizer()
    whole = read_one(tmp_path, {"text": text}, tokenizer, max_tokens=1_000_000)
    monkeypatch.setattr("carryon.cache.corpus.tokenize.WINDOW_CHARS", 2000)
    monkeypatch.setattr("carryon.cache.corpus.tokenize._MARGIN_CHARS", 400)
    parts = read_one(tmp_path, {"text": text}, tokenizer, max_tokens=1_000_001)
    assert parts.tokens.tolist() == whole.tokens.tolist()
    assert parts.char_end.tolist() == whole.char_end.tolist()
    assert parts.tokens[1:-1].tolist() == tokenizer.encode(text)[1:]


@dataclass(frozen=True)
class BadChat:
    id: str
    template: str | None
    messages: list[dict[str, str]]
    message: str


BAD_CHATS = [
    BadChat("none", None, HI_YO, r"tokenizer 'tiny' has no chat template.*or records of prompt"),
    BadChat("refuses", "{{ raise_exception('be nice') }}", HI_YO, r"refuses .*: be nice"),
    BadChat("fails", "{{ messages[0]['content'] + 1 }}", HI_YO, r"tiny refuses the messages"),
]


@pytest.mark.parametrize("case", BAD_CHATS, ids=lambda case: case.id)
def test_messages_that_cannot_be_rendered_are_refused(case: BadChat, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(template=case.template)
    with pytest.raises(InputError, match=rf"data\.jsonl:1: .*{case.message}"):
        read_one(tmp_path, {"messages": case.messages}, tokenizer)


def test_half_a_surrogate_pair_is_refused(tmp_path: Path) -> None:
    text = r"data\.jsonl:1: text: expected valid Unicode, got half .* '\\ud83d' at character 1"
    with pytest.raises(InputError, match=text):
        read_one(tmp_path, {"text": "a\ud83d"}, make_tokenizer())


def test_a_tokenizer_without_offsets_is_refused(tmp_path: Path) -> None:
    class SlowTokenizer:
        name_or_path = "slow"

    path = write_lines(tmp_path / "data.jsonl", {"text": "a"})
    text = "tokenizer 'slow': expected a fast tokenizer, .* got SlowTokenizer"
    with pytest.raises(InputError, match=text):
        read_corpus([path], SlowTokenizer(), settings=CorpusSettings(), max_tokens=8)  # type: ignore[arg-type]


def test_a_tokenizer_without_end_of_text_takes_messages_only(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    assert read_one(tmp_path, {"messages": HI_YO}, tokenizer).loss_mask.sum() == 3
    with pytest.raises(InputError, match="has no end-of-text token, .* or give messages"):
        read_one(tmp_path, {"text": "a"}, tokenizer)


def losses(corpus: Corpus) -> list[tuple[str, int, int]]:
    """Return (reason, records, tokens) of all that the report counts."""
    report = corpus.report
    return [(loss.reason, loss.records, loss.tokens) for loss in (*report.losses, *report.notes)]


def make_tokenizer(
    *, frame: str = "<s> $A", template: str | None = TEMPLATE
) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer, 256 bytes and MERGES, that puts `frame` around a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(alphabet)}
    for left, right in MERGES:
        vocabulary[left + right] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    backend.post_processor = processors.TemplateProcessing(
        single=frame,
        special_tokens=[(token, backend.token_to_id(token)) for token in SPECIAL],
    )
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # not typed there
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.name_or_path = "tiny"
    tokenizer.chat_template = template
    return tokenizer


def write_lines(path: Path, *rows: dict[str, Any]) -> Path:
    """Write `rows` as JSON lines and return `path`."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(
    paths: Sequence[Path],
    tokenizer: PreTrainedTokenizerFast,
    settings: CorpusSettings | None = None,
    max_tokens: int = 100,
    data_settings: DataSettings | None = None,
) -> Corpus:
    """Read a corpus, with the default settings if none are given."""
    return read_corpus(
        paths,
        tokenizer,
        settings=settings or CorpusSettings(),
        data_settings=data_settings,
        max_tokens=max_tokens,
        end_tokens=tokenizer.convert_tokens_to_ids(["<|end|>", "</s>"]),
        folder=paths[0].parent / "cache" if paths else None,
    )


def read_one(
    folder: Path,
    record: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    settings: CorpusSettings | None = None,
    max_tokens: int = 100,
) -> Sample:
    """Write one record to a file in `folder`, read it, and return its only sample."""
    path = write_lines(folder / "data.jsonl", record)
    (sample,) = read([path], tokenizer, settings, max_tokens).samples
    return sample


def spell(tokenizer: PreTrainedTokenizerFast, tokens: Any) -> list[str]:  # noqa: ANN401
    """Return the tokens as the vocabulary spells them."""
    return [str(token) for token in tokenizer.convert_ids_to_tokens(tokens)]


@pytest.mark.parametrize(
    "bad",
    [
        {"prompt": 3, "completion": "x", "split": "held-out"},
        {"prompt": "h", "completion": "x", "split": "heldout"},
    ],
)
def test_bad_rows_that_are_marked_held_out_are_not_skipped_without_a_word(
    tmp_path: Path, bad: dict[str, Any]
) -> None:
    good = {"prompt": "h", "completion": "xyz"}
    path = write_lines(tmp_path / "data.jsonl", good, bad, good | {"prompt": 4})
    corpus = read_corpus(
        [path],
        make_tokenizer(),
        settings=CorpusSettings(),
        data_settings=DataSettings(tokenizer_workers=1, bad_rows="skip"),
        max_tokens=50,
    )
    [note] = [each for each in corpus.report.notes if each.reason == LOST_HELD_OUT]
    assert (note.records, note.first) == (1, f"{path}:2")


def test_held_out_records_without_a_sample_are_counted_and_warned_of(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "data.jsonl",
        {"prompt": "h", "completion": "xyz", "id": "kept"},
        {"prompt": "h", "completion": "", "split": "held-out"},
        {"prompt": "h", "completion": "", "id": "named"},
        {"prompt": "h", "completion": "a", "split": "held-out"},
        {"prompt": "h", "completion": ""},
    )
    corpus = read_corpus(
        [path],
        make_tokenizer(),
        settings=CorpusSettings(),
        data_settings=DataSettings(tokenizer_workers=1),
        max_tokens=50,
        held_out=["named"],
    )
    [note] = [each for each in corpus.report.notes if each.reason == LOST_HELD_OUT]
    assert (note.records, note.first) == (2, f"{path}:2")
    assert any(
        "marked held out, but gave no sample: 2 of them" in x for x in warnings(corpus.report)
    )
