"""Answers for people: a page of HTML with each question, the arms' answers, and the verdicts."""

from collections.abc import Mapping, Sequence

from carryon.tools.commands.pages.document import escaped, make_document
from carryon.train.inference.scoring.answer_file import Answer

_STYLE = """\
body { max-width: 90rem; }
h3 { font-size: 0.9rem; margin: 0; overflow-wrap: anywhere; }
pre { margin: 0.25rem 0; }
.question, .table { color: var(--grey); }
.arms { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 0.5rem; }
.arms > div { padding: 0.5rem 0.75rem; border-radius: 4px; }
.right { background: var(--good); }
.wrong { background: var(--bad); }
"""


def make_answer_page(
    judged: Mapping[str, Mapping[str, Sequence[Sequence[Answer]]]], *, title: str, table: str
) -> str:
    """Return an HTML page of answers.

    Args:
        judged: task -> arm -> for each problem its answers.
        title: of the page.
        table: text above the questions.
    """
    body = [f'<pre class="table">{escaped(table)}</pre>']
    for task, arms in judged.items():
        body.append(f"<h1>{escaped(task)}</h1>")
        for rows in zip(*arms.values(), strict=True):  # of one problem, an arm each
            first = rows[0][0]
            body.append(
                f"<h2>{escaped(first.id)}</h2>\n"
                f'<pre class="question" dir="auto">{escaped(first.question)}</pre>\n'
                f"<p>Right: {escaped(first.right)}</p>\n"
                f'<div class="arms">{"".join(map(_answer, (a for row in rows for a in row)))}</div>'
            )
    return make_document("\n".join(body), title=title, style=_STYLE)


def _answer(answer: Answer) -> str:
    verdict = "right" if answer.is_right else "wrong"
    cut = ", cut at the limit" * answer.is_cut
    number = f" #{answer.sample + 1}" * (answer.sample > 0)
    return (
        f'<div class="{verdict}"><h3>{escaped(answer.arm)}{number}: {verdict}{cut}</h3>'
        f'<pre dir="auto">{escaped(answer.text)}</pre></div>\n'
    )
