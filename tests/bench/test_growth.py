"""Exponents of growth."""

from pathlib import Path

import pytest

from carryon.cache.errors import InputError
from carryon.tools.bench import growth as module
from carryon.tools.bench.growth import Axis, exponents, growth, make_axes


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_the_exponent_of_a_power_is_the_power(power: float) -> None:
    sizes = [2, 20, 200]
    assert exponents(sizes, [3 * size**power for size in sizes]) == pytest.approx((power, power))


def test_a_constant_cost_does_not_hide_the_growth_of_large_sizes() -> None:
    sizes = [1, 10, 100]
    over_all, last = exponents(sizes, [50 + size**2 for size in sizes])
    assert over_all < 1.2 < 1.8 < last


def test_axes_of_all_that_grows(tmp_path: Path) -> None:
    axes = {axis.name: axis for axis in make_axes(0.02)}
    assert list(axes) == [
        "tokens", "samples", "units", "taps", "width", "vocabulary", "carry-ons",
    ]  # fmt: skip
    for name in ("tokens", "taps", "vocabulary"):
        root = tmp_path / name
        root.mkdir()
        ways = axes[name].prepare(axes[name].sizes[0], root)
        assert "epoch" in ways
        assert set(ways) == ({"epoch", "open", "resume"} if name == "tokens" else {"epoch"})
        assert all(measure() > 0 for measure in ways.values())


def test_figures_name_what_grows_too_fast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(size: int, root: Path) -> dict[str, object]:
        assert not list(root.iterdir())
        return {"epoch": lambda: 1e-3 * size**1.5, "open": lambda: 0.1}

    axis = Axis(name="moons", sizes=[1, 10, 100], prepare=prepare)  # type: ignore[arg-type]
    monkeypatch.setattr(module, "make_axes", lambda times: [axis])
    found = growth(rounds=1, out=str(tmp_path / "out"))
    assert [(each["figure"], each["value"], each["met"]) for each in found] == [
        ("growth.moons", pytest.approx(1.5), False),
        ("growth.moons.open", pytest.approx(0.0), True),
    ]
    assert found[0]["seconds"] == pytest.approx([1e-3, 1e-3 * 10**1.5, 1.0])
    assert (tmp_path / "out" / "growth.png").stat().st_size > 1000


def test_wrong_numbers_are_one_line() -> None:
    with pytest.raises(InputError, match="--rounds, --times: expected"):
        growth(rounds=0)
