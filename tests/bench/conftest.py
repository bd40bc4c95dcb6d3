"""What the commands of the benchmarks of trust start from, made once."""

import pytest

from carryon.tools.bench.trust.table import Things, make_things


@pytest.fixture(scope="session")
def things(tmp_path_factory: pytest.TempPathFactory) -> Things:
    return make_things(tmp_path_factory.mktemp("trust"))
