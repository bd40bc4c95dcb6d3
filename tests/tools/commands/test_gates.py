"""The page of a mixture's gate against an evaluation, and with hostile text."""

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from support.mixed_stores import make_anchor, make_source
from support.tiny_runs import TINY

from carryon.cache.store.reader import Store
from carryon.tools.cli.main import main
from carryon.tools.commands.pages.gates import make_gate_page, token_texts
from carryon.train.inference.evaluate import evaluate
from carryon.train.inference.token_shares import TokenShares, measure_token_shares
from carryon.train.trainer import finish
from carryon.train.trainer.trainer import train


class _Page(HTMLParser):
    """Tags, tooltips and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.titles: list[str] = []
        self.text, self._in_pre = "", False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self._in_pre |= tag == "pre"
        assert {name for name, _ in attrs} <= {
            *("class", "style", "title", "dir", "lang", "charset", "name", "content", "http-equiv")
        }
        self.titles += [value or "" for name, value in attrs if name == "title"]

    def handle_endtag(self, tag: str) -> None:
        self._in_pre &= tag != "pre"

    def handle_data(self, data: str) -> None:
        self.text += data * self._in_pre


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("gates")
    anchor = make_anchor(root)
    make_source(root, anchor, name="other")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finish, "plot_curves", lambda metrics, path: False)
        for by, name in (("probability", "run"), ("both", "both"), ("state", "state")):
            changes = {"epochs": 1, "mix_by": by, "taps": ["final"]}
            train(anchor, out=root / name, settings=TINY, mix=[str(root / "other")], **changes)
    return root


@pytest.mark.parametrize("run", ["run", "both"])
def test_shares_of_all_samples_are_those_of_an_evaluation(folder: Path, run: str) -> None:
    store, mix = Store.open(folder / "anchor"), [str(folder / "other")]
    carryon = folder / run / "carryon"
    report = evaluate(folder / "anchor", carryon=carryon, mix=mix, samples="all")
    each = [
        measure_token_shares(store, index, carryon=carryon, mix=mix)
        for index in range(store.num_samples)
        if store.read_sample(index, taps=[]).loss_mask[1:].any()
    ]
    gate = np.concatenate([shares.gate for shares in each])
    parts = np.concatenate([shares.parts for shares in each])
    losses = np.concatenate([shares.losses for shares in each])
    assert len(losses) == report.num_targets
    np.testing.assert_allclose(gate.sum(axis=1), 1, atol=1e-5)
    for column, name in enumerate(each[0].names):
        assert gate[:, column].mean() == pytest.approx(report.mixture["gate_shares"][name], 1e-4)
        assert parts[:, column].mean() == pytest.approx(report.mixture["target_shares"][name], 1e-4)
    assert losses.mean() == pytest.approx(report.carryon_nll, 1e-4)
    for shares in each:
        mask = store.read_sample(store.index_of(shares.id), taps=[]).loss_mask
        assert shares.targets.tolist() == (np.flatnonzero(mask[1:]) + 1).tolist()


def test_the_command_writes_a_page(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "page.html"
    options = ["--store", str(folder / "anchor"), "--mix", str(folder / "other")]
    options += ["--carryon", str(folder / "run" / "carryon"), "--sample", "chat"]
    assert main(["gates", *options, "--out", str(out)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    page = _Page(out.read_text("utf-8"))
    assert sum(result["gate_shares"].values()) == pytest.approx(1, abs=1e-4)
    assert len([title for title in page.titles if "gate" in title]) == result["targets"]
    assert "<|im_start|>" in page.text  # a special token under its name
    assert "def area(width, height):" in page.text
    states = [each.replace("/run/", "/state/") for each in options]
    assert main(["gates", *states, "--out", str(out)]) == 2
    assert "expected a carry-on with a gate, got one that reads" in capsys.readouterr().err
    assert main(["gates", *options, "--out", str(folder)]) == 2
    assert "--out: expected a file" in capsys.readouterr().err
    assert main(["gates", *options[:-1], "none", "--out", str(out)]) == 2
    assert "--sample: expected an id" in capsys.readouterr().err


def test_hostile_text_and_names_are_escaped() -> None:
    hostile = '</pre><script>alert("1")</script>'
    shares = TokenShares(
        id=hostile,
        names=["carry-on", hostile],
        tokens=np.arange(4, dtype=np.int32),
        spelled=[hostile.encode(), b"\x1b[31m", None, b"\xe4\xbd"],
        targets=np.array([1, 3]),
        gate=np.array([[0.25, 0.75], [1, 0]], dtype=np.float32),
        parts=np.array([[0.5, 0.5], [0, 1]], dtype=np.float32),
        losses=np.ones(2, dtype=np.float32),
        carryon_losses=np.ones(2, dtype=np.float32),
    )
    page = make_gate_page(shares, names=["", "", hostile, ""], title=hostile)
    parsed = _Page(page)
    assert "script" not in parsed.tags
    assert "\x1b" not in page
    assert parsed.text == hostile + "\\x1b[31m" + hostile + "\\xe4\\xbd"
    assert f"{hostile}: gate 0.750, part of the target 0.500" in parsed.titles[0]


def test_bytes_of_a_character_are_shown_as_codes_with_the_character() -> None:
    char = "\u4f60"
    data = char.encode()
    assert token_texts([b"a", None, data[:2], data[2:], b"\xff", data]) == [
        ("a", ""),
        ("", ""),
        ("\\xe4\\xbd", f"part of {char}"),
        ("\\xa0", f"part of {char}"),
        ("\\xff", "bytes that are no text"),
        (char, ""),
    ]
