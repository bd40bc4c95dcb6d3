"""The public names of `carryon.train`, and what importing them loads."""

import subprocess
import sys

import carryon.train


def test_every_public_name_is_there() -> None:
    assert {name for name in carryon.train.__all__ if getattr(carryon.train, name, None)} == set(
        carryon.train.__all__
    )
    assert set(carryon.train.__all__) <= set(dir(carryon.train))


def test_importing_the_package_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from carryon.train import TrainSettings; "
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"
