"""Answers as a model could have given them."""

from carryon.train.inference.scoring.answer_file import Answer


def make_answer(
    text: str, *, is_right: bool = True, is_cut: bool = False, sample: int = 0
) -> Answer:
    """Return an answer to the question `What?`, whose right answer is 4."""
    return Answer(
        task="t",
        arm="base",
        model="m",
        id="p",
        sample=sample,
        question="What?",
        right="4",
        text=text,
        is_right=is_right,
        tokens=3,
        is_cut=is_cut,
        seconds=0.1,
    )
