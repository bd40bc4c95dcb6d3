"""Plain technical English in everything that is shipped: phrases that no reader should meet."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
REFUSED = (
    "gone on with",
    "goes on with",
    "as usual",
    "by chance",
    "anew",
    "came to",
    "comes to",
    "so many",
    "nothing of ours",
    "take up",
)
SHIPPED = sorted(
    path
    for pattern in (
        "*.md",
        "*.cfg",
        "*.txt",
        "docs/**/*.md",
        "c*/**/*.py",
        "t*/**/*.py",
        "t*/**/*.yaml",
    )
    for path in ROOT.glob(pattern)
    if path != Path(__file__)
)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_refused_phrase_is_shipped(path: Path) -> None:
    text = " ".join(re.sub(r"^\s*(#|>)+", "", path.read_text(encoding="utf-8"), flags=re.M).split())
    text = re.sub(r'" f?"', "", text)  # a literal that is written over two lines
    found = [phrase for phrase in REFUSED if re.search(rf"\b{phrase}\b", text, re.I)]
    assert not found, f"write it as the field says it: {found}"


@pytest.mark.parametrize(
    "path",
    [path for path in SHIPPED if path.suffix == ".py"],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_no_docstring_begins_with_what_it(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            text = node.value.value
            assert not (isinstance(text, str) and text.lower().lstrip().startswith("what it ")), (
                text
            )
