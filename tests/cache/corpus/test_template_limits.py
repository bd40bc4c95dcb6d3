"""A chat template from anyone ends, whatever it does."""

import signal
import time

import pytest

from carryon.cache.corpus.chat.chat_template import ChatTemplate, UnfitError
from carryon.cache.corpus.records import Chat
from carryon.tools.bench.tiny_base import make_tiny_tokenizer

MESSAGE = {"role": "user", "content": "x"}
ENDLESS = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in 'x' * 9999999 %}{% for b in 'x' * 9999999 %}{% endfor %}{% endfor %}",
    "{{ 'x' * 10**10 }}",
    "{{ 9**(9**9) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
]


@pytest.mark.parametrize("text", ENDLESS)
def test_a_template_without_an_end_is_refused(text: str) -> None:
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = text + "{{ messages[0]['content'] }}"
    template = ChatTemplate(tokenizer, variables={}, today="", end_tokens=[])
    started_at = time.process_time()
    with pytest.raises(UnfitError, match="refuses the messages"):
        template.render(
            Chat(messages=[MESSAGE], is_trained=[False]), [MESSAGE], add_generation_prompt=True
        )
    assert time.process_time() - started_at < 5
    assert signal.getsignal(signal.SIGVTALRM) is signal.SIG_DFL
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)
