"""Tiny tokenizers of several kinds that have any template's special tokens.

Kinds differ in where tokens end: that decides which of them a target begins with.

    bytes             a token for each byte
    gpt2              GPT-2's word pattern: the last of several newlines stands apart
    llama3            Llama 3's word pattern: newlines stick together and to punctuation
    metaspace_first   SentencePiece's, a blank before the text
    metaspace_always  SentencePiece's, a blank before each piece between special tokens
    llama_legacy      Llama 2's: that blank made by a normalizer
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

Kind = Literal["bytes", "gpt2", "llama3", "metaspace_first", "metaspace_always", "llama_legacy"]
KINDS: tuple[Kind, ...] = (
    *("bytes", "gpt2", "llama3"),
    *("metaspace_first", "metaspace_always", "llama_legacy"),
)

LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# In byte-level spelling \u010a is a newline and \u0120 a blank
BYTE_MERGES = [
    ("\u010a", "\u010a"),
    (".", "\u010a"),
    (".", "\u010a\u010a"),
    (":", "\u010a"),
    (":", "\u010a\u010a"),
    (">", "\u010a"),
    (">", "\u010a\u010a"),
    ("\u0120", "H"),
    ("\u0120", "S"),
    ("H", "e"),
    ("\u0120H", "e"),
]
# \u2581 is SentencePiece's blank
PIECE_MERGES = [
    ("\u2581", "H"),
    ("H", "e"),
    ("\u2581H", "e"),
    ("\u2581", "S"),
    ("S", "e"),
    ("\u2581S", "e"),
    ("\u2581", "\u2581"),
    ("I", "t"),
    ("\u2581", "It"),
]
LETTERS = "\u2581" + "".join(map(chr, range(33, 127)))


def make_chat_tokenizer(
    kind: Kind,
    template: str,
    *,
    special: Sequence[str],
    added: Iterable[str] = (),
    bos: str | None = None,
    eos: str | None = None,
    is_rstrip: bool = False,
) -> PreTrainedTokenizerFast:
    """Return a tokenizer with a chat template.

    Args:
        kind: of KINDS.
        template: Jinja chat template.
        special: special tokens.
        added: further tokens that are whole but not special.
        bos: begin-of-text token, one of `special`.
        eos: end-of-text token, one of `special`.
        is_rstrip: whether special tokens swallow the whitespace behind them.
    """
    backend = _byte_level(kind) if kind in ("bytes", "gpt2", "llama3") else _pieces(kind)
    backend.add_special_tokens(
        [AddedToken(token, normalized=False, rstrip=is_rstrip) for token in dict.fromkeys(special)]
    )
    backend.add_tokens([AddedToken(token, normalized=False) for token in added])
    names = {"bos_token": bos, "eos_token": eos}
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # not typed there
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        **{name: token for name, token in names.items() if token},
    )
    tokenizer.name_or_path = "tiny"
    tokenizer.chat_template = template
    return tokenizer


def spell(tokenizer: PreTrainedTokenizerFast, tokens: Iterable[int]) -> str:
    """Return tokens as text, also where it begins or ends within a text; special ones as written.

    A decoder would drop a blank at the beginning, and merge what ends inside a character.
    """
    names = tokenizer.convert_ids_to_tokens([int(token) for token in tokens])
    whole = {token.content for token in tokenizer.added_tokens_decoder.values()}
    data = bytearray()
    for name in names:
        if name in whole:
            data += name.encode()
        elif isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel):
            data += bytes(BYTES[letter] for letter in name)
        elif name.startswith("<0x") and len(name) == 6:
            data.append(int(name[3:5], 16))
        else:
            data += name.replace("\u2581", " ").encode()
    return data.decode(errors="replace")


def _byte_level(kind: Kind) -> Tokenizer:
    vocabulary = {letter: index for index, letter in enumerate(BYTES)}
    merges = [] if kind == "bytes" else BYTE_MERGES
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "gpt2")
    backend.pre_tokenizer = level
    if kind == "llama3":
        words = pre_tokenizers.Split(Regex(LLAMA3_WORDS), behavior="isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([words, level])
    backend.decoder = decoders.ByteLevel()
    return backend


def _pieces(kind: Kind) -> Tokenizer:
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    for letter in LETTERS:
        vocabulary[letter] = len(vocabulary)
    for left, right in PIECE_MERGES:
        vocabulary.setdefault(left + right, len(vocabulary))
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=PIECE_MERGES, byte_fallback=True))
    strip: list[Any] = [decoders.Strip(" ", 1, 0)]
    if kind == "llama_legacy":
        prepend = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        backend.normalizer = normalizers.Sequence(prepend)
    else:
        scheme: Literal["first", "always"] = "first" if kind == "metaspace_first" else "always"
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    backend.decoder = decoders.Sequence(steps)
    return backend


def _byte_letters() -> Mapping[str, int]:
    """Return GPT-2's letter for each byte."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    letters = {chr(byte): byte for byte in shown}
    return letters | {chr(256 + index): byte for index, byte in enumerate(hidden)}


BYTES = _byte_letters()
