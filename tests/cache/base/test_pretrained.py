"""What torchao warns of is not shown when it is imported; what it says later is."""

import ast
import logging
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from carryon.cache.base.quiet import errors_only

ROOT = Path(__file__).resolve().parents[3]
LOGGERS = ("torchao", "torch.utils._pytree")
NAMES = ("AttentionInterface", "PreTrainedModel")


def test_loggers_say_errors_only_until_the_block_ends(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("some.library")
    log.setLevel(logging.INFO)

    def fail() -> None:
        log.warning("within")
        log.error("wrong")
        raise ValueError("in the block")

    with pytest.raises(ValueError, match="in the block"), errors_only("some.library"):
        fail()
    log.info("after")
    assert caplog.messages == ["wrong", "after"]


def test_an_import_of_the_package_leaves_the_loggers_of_others_as_they_were() -> None:
    program = f"""
import logging
before = [logging.getLogger(name).level for name in {LOGGERS}]
import carryon.cache.base.model
from carryon.train.modules.packed_attention import register_packed_attention
register_packed_attention()
assert before == [logging.getLogger(name).level for name in {LOGGERS}]
import sys
print("torchao" in sys.modules)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.stderr == ""
    assert ran.stdout.strip() == str(find_spec("torchao") is not None)


def test_what_imports_torchao_comes_from_one_place() -> None:
    paths = [path for room in ("cache", "train", "tools") for path in (ROOT / room).rglob("*.py")]
    texts = {path: path.read_text(encoding="utf-8") for path in paths}
    found = [
        f"{path.relative_to(ROOT)}: {name.name}"
        for path, text in texts.items()
        if any(name in text for name in NAMES)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom) and node.module == "transformers"
        for name in node.names
        if name.name in NAMES
    ]
    assert found == [
        "cache/base/pretrained.py: AttentionInterface",
        "cache/base/pretrained.py: PreTrainedModel",
    ]
