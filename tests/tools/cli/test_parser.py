"""Parsing a command line into the arguments of a typed function."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from carryon.cache.errors import InputError
from carryon.cache.settings import StoreSettings
from carryon.tools.cli.main import main
from carryon.tools.cli.options import options_of
from carryon.tools.cli.parser import parse_call
from carryon.tools.commands.train import train
from carryon.train.settings_file import PRESETS, read_preset


@dataclass(frozen=True, kw_only=True, slots=True)
class OvenSettings:
    """How hot, and for how long."""

    heat_kelvin: float = 450.0
    """Temperature, in kelvin; 100 % is on fire."""
    minutes: int = 30
    """Time, in minutes."""
    racks: list[str] = field(default_factory=lambda: ["middle"])
    """Racks in use."""
    mode: Literal["fan", "grill"] = "fan"
    """Where the heat comes from."""

    def __post_init__(self) -> None:
        if self.minutes < 1:
            raise InputError(f"--minutes: expected 1 or more, got {self.minutes}")


def bake(
    dish: str,
    /,
    *,
    guests: list[str],
    label: str | None = None,
    loud: bool = False,
    silent: bool = True,
    oven: OvenSettings,
) -> None:
    """Bake a dish.

    It takes a while.

    Example:
        carryon bake pie --guests ann bob

    Args:
        dish: What to bake.
        guests: Who will eat.
        label: Name on the box.
        loud: Ring when done.
        silent: Ring softly.
        oven: The settings.
    """


def parse(*argv: str) -> dict[str, Any]:
    return dict(parse_call(bake, argv, prog="carryon bake")[0].arguments)


def refused(*argv: str) -> str:
    with pytest.raises(InputError) as caught:
        parse(*argv)
    return str(caught.value)


def test_defaults_come_from_the_function_and_the_dataclass() -> None:
    assert parse("pie", "--guests", "ann") == {
        "dish": "pie",
        "guests": ["ann"],
        "label": None,
        "loud": False,
        "silent": True,
        "oven": OvenSettings(),
    }


def test_a_field_is_an_option_with_dashes_and_underscores_are_accepted() -> None:
    dashed = parse("pie", "--guests", "ann", "--heat-kelvin", "1e3")
    assert dashed["oven"].heat_kelvin == 1000.0
    assert parse("pie", "--guests", "ann", "--heat_kelvin=1e3") == dashed


def test_underscores_in_values_stay() -> None:
    assert parse("my_pie", "--guests=a_b", "--label", "e_f")["label"] == "e_f"
    assert parse("my_pie", "--guests", "a_b", "c_d")["guests"] == ["a_b", "c_d"]


def test_a_list_takes_several_values_and_may_be_repeated() -> None:
    found = parse("pie", "--guests", "ann", "bob", "--racks", "top", "low", "--guests", "cy")
    assert found["guests"] == ["ann", "bob", "cy"]
    assert found["oven"].racks == ["top", "low"]


def test_numbers_in_a_list_of_texts_stay_texts() -> None:
    assert parse("pie", "--guests", "7", "null", "a b")["guests"] == ["7", "null", "a b"]


def test_a_list_of_numbers_is_read_as_numbers() -> None:
    def weigh(*, grams: list[int], shares: tuple[float, ...] = (0.5,)) -> None:
        """Weigh."""

    call, _ = parse_call(
        weigh, ["--grams", "1", "-2", "--shares", "-.1", "1e-3", "-1e-3"], prog="weigh"
    )
    assert call.kwargs == {"grams": [1, -2], "shares": (-0.1, 0.001, -0.001)}


def test_names_used_elsewhere_are_understood() -> None:
    with pytest.raises(InputError, match="no option --lr, did you mean --learning-rate?"):
        parse_call(train, ["--store", "s", "--out", "o", "--lr", "1"], prog="carryon train")


def test_switches_have_both_forms() -> None:
    assert parse("pie", "--guests", "ann", "--loud")["loud"] is True
    assert parse("pie", "--guests", "ann", "--no-loud")["loud"] is False
    assert parse("pie", "--guests", "ann", "--no-silent")["silent"] is False


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (("pie",), "expected --guests, got nothing"),
        (("--guests", "ann"), "expected dish, got nothing"),
        (("pie", "--guests"), "--guests: expected at least one argument"),
        (("pie", "--guests", "a", "--minutes", "x"), "--minutes: expected a whole number, got 'x'"),
        (("pie", "--guests", "a", "--minutes", "0"), "--minutes: expected 1 or more, got 0"),
        (("pie", "--guests", "a", "--mode", "x"), "--mode: expected fan or grill, got 'x'"),
        (("pie", "--guests", "a", "--minute", "3"), "no option --minute, did you mean --minutes?"),
        (("pie", "--guests", "a", "--zzz", "3"), "no option --zzz: see carryon bake --help"),
        (("pie", "--guests", "a", "--heat_kelvin"), "--heat-kelvin: expected one argument"),
        (("pie", "--guests", "a", "--loud=x"), "--loud: ignored explicit argument"),
        (("pie", "--guests", "a", "--loud", "extra"), "unexpected word 'extra'"),
        ((), "expected dish, --guests, got nothing"),
        (("pie", "--guests", "a", "--config", "none.yaml"), "none.yaml"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_an_error_is_one_line(argv: tuple[str, ...], text: str) -> None:
    message = refused(*argv)
    assert text in message
    assert "\n" not in message
    assert "class" not in message


def test_config_round_trip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("pie", "--guests", "ann", "b: c", "--loud", "--racks", "top", "--heat-kelvin", "300")
    with pytest.raises(SystemExit) as caught:
        parse(*words, "--print-config")
    assert caught.value.code == 0
    config = tmp_path / "bake.yaml"
    config.write_text(capsys.readouterr().out)
    assert parse("--config", str(config), "pie") == parse(*words)
    assert parse("pie", "--config", str(config), "--racks", "low")["oven"].racks == ["low"]


def test_config_keys_are_the_options_without_groups(tmp_path: Path) -> None:
    config = tmp_path / "bake.yaml"
    config.write_text("dish: pie\nguests: [ann]\nheat_kelvin: 300\nminutes: 2\n")
    found = parse("--config", str(config))
    assert found["oven"] == OvenSettings(heat_kelvin=300.0, minutes=2)
    config.write_text("dish: pie\nguests: ann\n")
    assert "--guests: expected a list, got 'ann'" in refused("--config", str(config))
    config.write_text("dish: pie\nguests: [ann]\nwine: red\n")
    assert "wine" in refused("--config", str(config))


def page(*argv: str, capsys: pytest.CaptureFixture[str], basic: tuple[str, ...] = ()) -> str:
    """Return the page that help prints."""
    with pytest.raises(SystemExit) as caught:
        parse_call(bake, argv, prog="carryon bake", basic=basic)
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_the_full_help_explains_every_option_with_its_default(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = " ".join(page("--help-all", capsys=capsys).split())
    assert "usage: carryon bake DISH --guests GUESTS ... [options]" in text
    assert "It takes a while. Example: carryon bake pie --guests ann bob options:" in text
    assert "--guests GUESTS ... Who will eat. (required)" in text
    assert "--loud Ring when done. --silent" in text
    assert "--silent Ring softly. (default: yes; --no-silent turns it off)" in text
    assert "--heat-kelvin X Temperature, in kelvin; 100 % is on fire. (default: 450)" in text
    assert "--racks RACKS ... Racks in use. (default: middle)" in text
    assert "--mode CHOICE Where the heat comes from. (fan|grill; default: fan)" in text
    assert "How hot, and for how long: --heat-kelvin" in text
    assert "Common: --config" in text


def test_help_shows_the_basic_options_in_their_order(capsys: pytest.CaptureFixture[str]) -> None:
    text = page("--help", capsys=capsys, basic=("minutes", "dish"))
    assert re.findall(r"^  (\S+)", text, re.MULTILINE) == ["--minutes", "DISH", "-h,", "--help-all"]
    assert re.findall(r"^\S.*:$", text, re.MULTILINE) == ["Example:", "options:"]
    text = page("--help-all", capsys=capsys, basic=("minutes", "dish"))
    assert text.index("--minutes") < text.index("--help-all") < text.index("  --guests")


def test_help_works_after_a_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert "usage: " in page("pie", "--guests", "ann", "-h", capsys=capsys)


def test_help_texts_of_settings_are_read_from_the_source() -> None:
    def keep(*, store: StoreSettings) -> None:
        """Keep."""

    found = {item.flag: item for item in options_of(keep)}
    assert "`final`" in found["--taps"].help
    assert found["--unit-tokens"].default == StoreSettings().unit_tokens
    assert json.dumps(found["--taps"].default) == '["final"]'


@pytest.mark.parametrize("words", [["--config", "large"], ["--config=large"]])
def test_a_preset_is_read_by_name_and_the_command_line_wins(words: list[str]) -> None:
    call, _ = parse_call(train, [*words, "--store", "s", "--out", "o", "--blocks", "3"], prog="t")
    carryon = call.arguments["settings"].carryon
    preset = read_preset("large")
    assert (carryon.width, carryon.intermediate_size) == (
        preset["width"],
        preset["intermediate_size"],
    )
    assert carryon.blocks == 3


def test_a_file_wins_over_a_preset_of_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "large").write_text("width: 32\n")
    monkeypatch.chdir(tmp_path)
    call, _ = parse_call(train, ["--config", "large", "--store", "s", "--out", "o"], prog="t")
    assert call.arguments["settings"].carryon.width == 32


@pytest.mark.parametrize("name", list(PRESETS))
def test_every_preset_is_a_shape_that_can_be_built(name: str) -> None:
    call, _ = parse_call(train, ["--config", name, "--store", "s", "--out", "o"], prog="t")
    assert call.arguments["settings"].carryon.width > 0


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "a: 1: 2", "day: 2026-99-99", "\x00", "- 1", "x" * (1 << 21)],
)
def test_a_config_that_is_no_settings_is_one_line(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert main(["train", "--config", str(path), "--store", "x", "--out", "y"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert str(path) in line
    assert len(line) < 1000
