"""Answers for people: a page of HTML with each question, the arms' answers, and the verdicts.

Text of data and models is hostile: control characters are shown by their codes, HTML is escaped.
"""

from collections.abc import Mapping, Sequence

from carryon.tools.commands.shown_samples import escaped
from carryon.train.inference.scoring.answer_file import Answer

_PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --grey: #5f6368; --right: #d9f2df; --wrong: #f9dedc; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --grey: #a5aab0; --right: #173d22; --wrong: #4a1c1a; }}
}}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 90rem; margin: 2rem auto;
  padding: 0 1rem; }}
h2 {{ font-size: 1rem; margin: 2rem 0 0.5rem; overflow-wrap: anywhere; }}
h3 {{ font-size: 0.9rem; margin: 0; overflow-wrap: anywhere; }}
pre {{ font: 13px/1.6 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  margin: 0.25rem 0; }}
.question, .table {{ color: var(--grey); }}
.arms {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 0.5rem; }}
.arms > div {{ padding: 0.5rem 0.75rem; border-radius: 4px; }}
.right {{ background: var(--right); }}
.wrong {{ background: var(--wrong); }}
</style>
<h1>{title}</h1>
<pre class="table">{table}</pre>
{body}
</html>
"""


def make_answer_page(
    judged: Mapping[str, Mapping[str, Sequence[Sequence[Answer]]]], *, title: str, table: str
) -> str:
    """Return an HTML page that needs nothing else and runs nothing.

    Args:
        judged: task -> arm -> for each problem its answers.
        title: of the page.
        table: text above the questions.
    """
    body = []
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
    return _PAGE.format(title=escaped(title), table=escaped(table), body="\n".join(body))


def _answer(answer: Answer) -> str:
    verdict = "right" if answer.is_right else "wrong"
    cut = ", cut at the limit" * answer.is_cut
    number = f" #{answer.sample + 1}" * (answer.sample > 0)
    return (
        f'<div class="{verdict}"><h3>{escaped(answer.arm)}{number}: {verdict}{cut}</h3>'
        f'<pre dir="auto">{escaped(answer.text)}</pre></div>\n'
    )
