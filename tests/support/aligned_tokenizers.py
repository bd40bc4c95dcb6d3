"""Tokenizers of different kinds, trained in a moment, to be aligned with each other."""

import json
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = (
    "The quick brown fox's den isn't far; we'll see it, they've said.  Two  spaces.\n\n",
    "def area(width, height):\n    if width < 0:\n        raise ValueError('negative')\n",
    "    return width * height  # 12345678 and 3.14159\n\n\n\tindented = [1, 22, 333]\n",
    "Gr\u00fc\u00dfe aus K\u00f6ln, caf\u00e9, \u4f60\u597d\u4e16\u754c\uff0c"
    "\u65e5\u672c\u8a9e\u306e\u6587\u7ae0\u3002 ",
    "emoji \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 na\u0308ive q\u0323 "
    "<|im_x <|im_start <",
)
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CAMEL = r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"
"""Cuts identifiers at capitals: XML|Http."""
CASES = (
    "XMLHttpRequest ",
    "XMLHTTP XMLH LH ",
    "\u306eAbc \u306eA e\u0301A E\u0301Ab ",
    "\u306e's ",
) * 3
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "{% for call in message.tool_calls or [] %}<call>{{ call.function.name }} "
    "{{ call.function.arguments | tojson }}</call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BRACKETS = (
    "[system] You help.\n{% for message in messages %}[{{ message['role'] }}] "
    "{{ message['content'] | trim }}"
    "{% for call in message.tool_calls or [] %}<{{ call.function.name }}: "
    "{{ call.function.arguments | tojson }}>{% endfor %}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


def make_tokenizer(kind: str, *, vocab_size: int = 420, template: str = CHATML) -> Any:  # noqa: ANN401
    """Return a tokenizer of a kind: gpt2, lossy, qwen, o200k, camel, metaspace, gemma."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=kind in ("metaspace", "gemma")))
    alphabet: list[str] = []
    splits = {"qwen": QWEN, "o200k": O200K, "camel": CAMEL}
    if kind in ("gpt2", "lossy"):
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif kind in splits:
        split = pre_tokenizers.Split(Regex(splits[kind]), "isolated")
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
        if kind == "qwen":
            tokenizer.normalizer = normalizers.NFC()
    elif kind == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
        tokenizer.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    special = ["<|im_start|>", "<|im_end|>"]
    if kind in ("metaspace", "gemma"):
        special += [f"<0x{byte:02X}>" for byte in range(256)]
        training = [text.encode("ascii", "ignore").decode() for text in TEXTS]
    else:
        alphabet, training = sorted(pre_tokenizers.ByteLevel.alphabet()), list(TEXTS)
        training += CASES if kind in ("o200k", "camel") else ()
        if kind == "lossy":  # without the bytes 4 and 6, as SmolLM2's
            alphabet = [name for name in alphabet if name not in "\u0104\u0106"]
        tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size + 256,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
        min_frequency=1,
        max_token_length=12,
    )
    tokenizer.train_from_iterator(training * 3, trainer)
    if kind == "gemma":  # words are kept apart in training, and by the vocabulary afterwards
        tokenizer.pre_tokenizer = None  # type: ignore[assignment]
    if kind in ("metaspace", "gemma"):  # byte tokens are no added tokens
        rules = json.loads(tokenizer.to_str())
        rules["added_tokens"] = [x for x in rules["added_tokens"] if "0x" not in x["content"]]
        tokenizer = Tokenizer.from_str(json.dumps(rules))
    make: Any = PreTrainedTokenizerFast
    return make(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        chat_template=template,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
