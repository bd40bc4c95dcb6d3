"""Problems that a random base solves often, by a rule of the user."""

import json
from pathlib import Path

RULE = """
def accept(text, problem):
    return sum(map(ord, text)) % 4 != 0

def refuse(text, problem):
    return False
"""


def write_easy_problems(folder: Path) -> None:
    """Write `problems.jsonl`, and `easy_rule.py` with the rules `accept` and `refuse`."""
    (folder / "easy_rule.py").write_text(RULE)
    records = [
        {"id": f"q{number}", "question": f"{'the ' * (number % 4 + 1)}{number}", "answer": "x"}
        for number in range(16)
    ]
    (folder / "problems.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
