"""`carryon preview`: the first samples of a corpus, as the model sees them."""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from carryon.cache.errors import InputError
from carryon.cache.settings import CorpusSettings, DataSettings, StoreSettings
from carryon.tools.cli.output import print_result, visible
from carryon.tools.commands.pages.samples import make_sample_page
from carryon.tools.commands.pages.shown_samples import print_samples, show_sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from carryon.cache.corpus.first_rows import RecordSamples
    from carryon.tools.commands.pages.shown_samples import ShownSample

logger = logging.getLogger(__name__)


def preview(
    *,
    base: str,
    data: list[str],
    rows: int = 3,
    html: str = "",
    trust_remote_code: bool = False,
    corpus: CorpusSettings,
    data_settings: DataSettings,
) -> dict[str, Any]:
    """Show the first samples of a corpus as the model sees them.

    The text is decoded from the tokens that an extraction would store: prompt grey, targets green,
    special tokens boxed, the token at which the model learns to stop marked. Where stdout is no
    terminal, or NO_COLOR is set, targets stand in [[ ]] and special tokens in { }. Below is the
    table of records kept and lost among these rows. Tokenizer and config of the base are read, its
    weights are not. The last line on stdout is a JSON line with the figures.

    Example:
        carryon preview --base HuggingFaceTB/SmolLM2-135M-Instruct --data chats.jsonl

    Args:
        base: The base: hub id (NAME/REPO or NAME/REPO@REVISION), folder or .gguf file.
        data: Files of the corpus, folders of such files, or hub ids.
        rows: Records to read of each kind: messages, preference pairs, prompts with completions,
            texts.
        html: File for the same as a page of HTML, in full. Empty: no file.
        trust_remote_code: Run Python code that comes with a base, of its tokenizer and config. Read
            it first.
        corpus: How text becomes samples.
        data_settings: How the data are read.
    """
    if rows < 1:
        raise InputError(f"--rows: expected 1 or more, got {rows}")
    from carryon.cache.base.facts import read_facts
    from carryon.cache.base.source.location import locate_base
    from carryon.cache.base.source.own_code import digest_code
    from carryon.cache.corpus.chat.template_settings import resolve_settings
    from carryon.cache.corpus.first_rows import read_first
    from carryon.cache.corpus.report import format_report, warnings
    from carryon.tools.cli.places import check_page, write_page

    if html:
        check_page(html, name="--html")
    code_sha256 = None
    try:
        code_sha256 = digest_code(locate_base(base))
    except InputError as error:
        if trust_remote_code:
            raise
        logger.warning(f"{error}; its code is not run")
    if code_sha256 is not None:
        logger.warning(
            f"base {base}: it comes with Python code ({code_sha256[:12]}), "
            f"{'which is run' if trust_remote_code else 'which is not run'}"
        )
    facts = read_facts(base, trusts_code=trust_remote_code)
    limit = min(facts.context_tokens, StoreSettings().unit_tokens)
    if corpus.max_tokens > facts.context_tokens:
        raise InputError(
            f"--max-tokens: expected at most {facts.context_tokens}, the base's context, got "
            f"{corpus.max_tokens}"
        )
    corpus, tokenizer = resolve_settings(corpus, facts.tokenizer)
    records, report = read_first(
        data,
        tokenizer,
        num_rows=rows,
        settings=corpus,
        max_tokens=corpus.max_tokens or limit,
        data_settings=data_settings,
        end_tokens=facts.end_tokens,
        vocab_size=facts.vocab_size,
    )
    if not report.records:
        raise InputError(f"--data: expected at least one record, got none in {' '.join(data)}")
    shown = list(_show(records, tokenizer, facts.end_tokens))
    table = format_report(report)
    print_samples(shown)
    print(f"\n{visible(table)}\n")
    for line in warnings(report):
        logger.warning(line)
    if html:
        page = make_sample_page(shown, title=f"First samples of {' '.join(data)}", table=table)
        write_page(html, page, name="--html")
    kinds = Counter(record.kind for record in records)
    return print_result(
        {
            "records": report.records,
            "kept": report.kept,
            "kinds": dict(kinds),
            "samples": len(shown),
            "tokens": sum(each.num_tokens for each in shown),
            "targets": sum(each.num_targets for each in shown),
            "html": html,
            "code_sha256": code_sha256,
            "report": report.to_dict(),
        }
    )


def _show(
    records: "list[RecordSamples]", tokenizer: "PreTrainedTokenizerBase", end_tokens: Sequence[int]
) -> "Iterator[ShownSample]":
    """Yield the samples of each record as they are shown."""
    for record in records:
        for sample in record.samples:
            is_last = sample is record.samples[-1] and record.num_more > 0
            yield show_sample(
                sample,
                tokenizer,
                kind=record.kind,
                where=record.where,
                end_tokens=end_tokens,
                more=f"{record.num_more:,} more samples of this record not shown" * is_last,
            )
