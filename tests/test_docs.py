"""README and docs say what is there, and every block of them runs as it stands."""

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from functools import cache
from pathlib import Path

import pytest
from support.doc_pages import (
    PAGES,
    ROOT,
    RUN,
    SHOWN,
    blocks_of,
    commands_of,
    make_page_base,
    make_page_folder,
    options_of_page,
    run_page,
)

import carryon.cache
import carryon.train
from carryon.tools.bench.__main__ import BENCH
from carryon.tools.bench.experiments import EXPERIMENTS
from carryon.tools.bench.registry import list_groups
from carryon.tools.cli.main import CARRYON, main
from carryon.train.kinds import KINDS

README = (ROOT / "README.md").read_text(encoding="utf-8")
MOST_README_LINES = 200
OF_OTHER_PROGRAMS = {"--nproc-per-node", "--job-name", "--array", "--gres", "--cpus-per-task"} | {
    "--time",
    "--requeue",
}
"""Options in the text that are neither ours nor pytest's."""
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def help_of(program: Callable[[Sequence[str]], int], name: str) -> str:
    """Return the whole help of a command."""
    text = io.StringIO()
    with redirect_stdout(text), redirect_stderr(io.StringIO()), suppress(SystemExit):
        program([name, "--help-all"])
    return text.getvalue()


@cache
def options_of(name: str) -> frozenset[str]:
    """Return the options of `carryon NAME`, or of the benchmark `bench NAME`."""
    kind, _, rest = name.rpartition(" ")
    text = help_of(BENCH.main if kind else main, rest)
    assert text, name
    return frozenset(options_of_page(text))


def known_options() -> set[str]:
    """Return every option that a page may name."""
    names = [*CARRYON.commands, *(f"bench {name}" for name in ("store", *EXPERIMENTS))]
    options = OF_OTHER_PROGRAMS.union(*map(options_of, names))
    return options | set(re.findall(r'"(--[\w-]+)"', (ROOT / "tests/conftest.py").read_text()))


@pytest.fixture(scope="module")
def page_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_page_base(tmp_path_factory.mktemp("bases") / "thirty-blocks")


@pytest.fixture
def _own_kinds() -> Iterator[None]:
    """Take back the kinds that a page registers."""
    before = dict(KINDS)
    yield
    KINDS.clear()
    KINDS.update(before)


@pytest.mark.slow
@pytest.mark.usefixtures("_own_kinds")
@each_page
def test_every_block_runs(
    page: Path, page_base: Path, store_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_page_folder(store_tmp, page_base)
    monkeypatch.chdir(store_tmp)
    run_page(page)


@each_page
def test_every_block_has_a_language_and_what_is_not_run_a_reason(page: Path) -> None:
    for block in blocks_of(page):
        where = f"{page.name}:{block.line}"
        assert block.language in (*RUN, *SHOWN), where
        assert not block.reason or block.language in RUN, f"{where}: is never run"


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= MOST_README_LINES


@each_page
def test_pages_are_ascii_and_nothing_is_left_to_fill_in(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.isascii()
    assert not re.search(r"\b(TODO|TBD|FIXME|XXX)\b", text)


@each_page
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target, heading in re.findall(r"\]\((?!https?://)([^)#]*)(?:#([^)]*))?\)", text):
        path = page.parent / target if target else page
        assert path.exists(), target
        if heading:
            assert heading in headings_of(path), f"{target}#{heading}"


def headings_of(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_readme_leads_to_every_page_and_every_picture_is_on_one() -> None:
    for page in PAGES:
        assert page.name == "README.md" or f"]({page.relative_to(ROOT)})" in README, page.name
    texts = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for picture in (ROOT / "docs").glob("*.[ps][nv]g"):
        assert picture.name in texts, f"{picture.name}: on no page"


def test_the_table_of_commands_is_the_list_of_commands() -> None:
    rows = re.findall(r"^\| (`carryon [^|]+`) \| \S", README, re.M)
    listed = [name for row in rows for name in re.findall(r"`carryon ([\w-]+)`", row)]
    assert sorted(listed) == sorted(CARRYON.commands)


def test_every_benchmark_is_explained() -> None:
    texts = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for name in (*list_groups(), *EXPERIMENTS):
        assert f"python -m carryon.tools.bench {name}" in texts, name


@each_page
def test_every_command_uses_options_that_exist(page: Path) -> None:
    for block in blocks_of(page):
        for command in commands_of(block.code) if block.language == "sh" else ():
            called = re.search(r"(?:carryon|carryon\.tools\.(bench)) ([a-z][\w-]*)", command)
            if called:
                name = " ".join(filter(None, called.groups()))
                used = options_of_page(command[called.end() :])
                assert used <= options_of(name), f"{page.name}:{block.line}: {command}"


@each_page
def test_every_option_in_the_text_exists(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    if page.name != "CHANGELOG.md":  # which names the options of before too
        assert options_of_page(text) <= known_options()


def test_the_two_commands_name_extras_that_exist() -> None:
    setup = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    for command in ('pip install -c constraints.txt -e ".[demo]" && carryon demo', '".[test]"'):
        assert command in README
    for page in PAGES:
        for extra in re.findall(r"\.\[(\w+)\]", page.read_text(encoding="utf-8")):
            assert re.search(rf"^{extra} =$", setup, re.M), extra


@pytest.mark.parametrize("package", [carryon.cache, carryon.train], ids=lambda each: each.__name__)
def test_every_public_name_is_documented(package: object) -> None:
    page = (ROOT / "docs" / "python-api.md").read_text(encoding="utf-8")
    for name in package.__all__:  # type: ignore[attr-defined]
        assert re.search(rf"`[^`\n]*\b{name}\b[^`\n]*`", page), name
