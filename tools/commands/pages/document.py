"""The frame of all pages of HTML, which need nothing else and run nothing.

Text of data and models is hostile: control characters are shown by their codes, HTML is escaped.
"""

import html

from carryon.tools.cli.output import visible

_PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --grey: #5f6368; --green: #0b5d1e; --good: #d9f2df;
  --bad: #f9dedc; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --grey: #a5aab0; --green: #a9e8b7; --good: #173d22; --bad: #4a1c1a; }}
}}
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; padding: 0 1rem; }}
h2 {{ font-size: 1rem; margin: 2rem 0 0.5rem; overflow-wrap: anywhere; }}
pre {{ font: 13px/1.6 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }}
{style}</style>
<h1>{title}</h1>
{body}
</html>
"""


def make_document(body: str, *, title: str, style: str) -> str:
    """Return an HTML page.

    Args:
        body: HTML.
        title: text.
        style: CSS.
    """
    return _PAGE.format(title=escaped(title), style=style, body=body)


def escaped(text: str) -> str:
    """Return a text for HTML, with its control characters as codes."""
    return html.escape(visible(text))
