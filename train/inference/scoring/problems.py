"""Problems: questions with right answers, of a task of reasoning-gym or of the user's data."""

import json
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from carryon.cache.corpus.files import plan_shards, read_shard
from carryon.cache.corpus.formats.contents import Chat, Completion, read_content
from carryon.cache.corpus.formats.json_values import check_text
from carryon.cache.corpus.reading.cache_folder import cache_folder
from carryon.cache.corpus.records import kind_of, marks_held_out, read_group, read_id
from carryon.cache.corpus.rows import BadRow, Row
from carryon.cache.corpus.sources import open_sources
from carryon.cache.errors import InputError, MissingError
from carryon.cache.files.documents import digest_of
from carryon.cache.optional import require
from carryon.cache.settings import DataSettings
from carryon.train.inference.scoring.numbers import find_numbers, get_quantity
from carryon.train.inference.scoring.rules import Rule, find_marked, parse_rule

logger = logging.getLogger(__name__)

AUTO = "auto"
"""`task` for a task; for data `last-number`, `boxed` or `end`, as the right answers are."""
PROVENANCE = "sampled"
"""Field of a record of `carryon sample`; no kind of record has one of this name."""
QUESTION_KEYS = ("question", "prompt", "problem")
ANSWER_KEYS = ("answer", "completion", "response", "solution")
_MARKER = "####"
_EXAMPLE_SEEDS = 500_000
"""Problem i of a task is drawn from seed + i, so examples lie this far from the problems."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """A question with a right answer, and the rule that judges others."""

    id: str
    question: str
    """The last turn of the user."""
    answer: str
    """The right answer, or one of them; empty where only a verifier knows."""
    result: str = ""
    """The right answer without its working, for a hint; empty: not known."""
    rule: Rule
    before: tuple[Mapping[str, Any], ...] = ()
    """Messages before the question, such as a system message."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    group: str = ""
    """Of problems that are held out together, such as those of one template; empty: of none."""
    verify: Callable[[str], float] | None = None
    """The task's own verifier: credit of an answer, 1 if it is right."""

    @property
    def asked(self) -> str:
        """What is asked: the question, and a digest of any messages before it."""
        if not self.before:
            return self.question
        return f"{digest_messages(self.before)} {self.question}"

    @property
    def folded(self) -> str:
        """The question without case and white space, by which equal ones are told."""
        return " ".join(self.question.casefold().split())

    @property
    def half(self) -> str:
        """What decides whether answers are held out: the group, or what is asked."""
        return f"group {self.group}" if self.group else self.asked

    def is_right(self, text: str) -> bool:
        """Return whether an answer is right by the rule."""
        return self.rule.is_right(text, self)


def read_problems(
    source: str, *, num: int, seed: int, rule: str = AUTO, is_training: bool = False
) -> list[Problem]:
    """Return problems of a task or of data; the same arguments give the same problems.

    Data are read as a corpus is: prompts (`prompt`, `question` or messages) with right answers
    (`answer`, `completion` or the last assistant turn). If some records are marked held out, only
    those are posed.

    Args:
        source: a task of reasoning-gym, such as `chain_sum` or, with settings of it,
            `chain_sum:min_terms=2,max_terms=2`; or a file, folder or data set on the hub.
        num: number of problems; from data at most this many, drawn with the seed.
        seed: of the task's generator, or of the draw from data.
        rule: see `parse_rule`, or `auto`.
        is_training: pose the records that are not marked held out.

    Raises:
        InputError: no such task, setting or rule; a record without a question or answer; an
            answer that the rule cannot compare; a rule that finds nothing in right answers that
            mark theirs; or for training, only records held out.
        MissingError: the file is not there.
        MissingExtraError: reasoning-gym is not installed.
    """
    if not source.strip():
        raise InputError("tasks: expected a task, or a file of problems, got an empty text")
    parsed = None if rule == AUTO else parse_rule(rule)
    task_rule = parsed or parse_rule("task")
    if is_data(source):
        problems = _read_data(source, parsed or parse_rule("end"), is_training=is_training)
        problems = _draw(_with_unique_ids(problems), num=num, seed=seed)
        if parsed is None:
            chosen = _choose_rule([problem.answer for problem in problems])
            logger.info(f"{source}: answers are judged by the rule {chosen.name}")
            problems = [replace(problem, rule=chosen) for problem in problems]
        problems = [replace(each, result=find_result(each.answer, each.rule)) for each in problems]
    else:
        problems = list(_make_task(source, num=num, seed=seed, rule=task_rule))
    for problem in problems:
        if lacking := problem.rule.lacks(problem):
            raise InputError(
                f"{problem.id}: the rule {problem.rule.name} expects {lacking}, got "
                f"{problem.answer!a:.60}. Fix: another --rule"
            )
    _check_found(problems, source)
    return problems


def _check_found(problems: Sequence[Problem], source: str) -> None:
    """Check that the rule finds the right answer in one that marks it, such as by `####`.

    Where it finds nothing the right answer is compared whole, which is meant for bare ones.

    Raises:
        InputError: it finds nothing in any.
    """
    unfound = [
        problem.answer
        for problem in problems
        if find_marked(problem.answer) is not None and problem.rule.find(problem.answer) is None
    ]
    if not unfound:
        return
    line = f"{source}: rule: {problems[0].rule.name} finds nothing in"
    such = f"such as {unfound[0]!a:.60}. Fix: another --rule, or right answers alone"
    if len(unfound) == len(problems):
        raise InputError(f"{line} any of the {len(problems):,} right answers, {such}")
    logger.warning(f"{line} {len(unfound):,} of {len(problems):,} right answers, {such}")


def read_examples(source: str, *, num: int, seed: int, posed: Sequence[Problem]) -> list[Problem]:
    """Return problems that are none of those posed, to show with their answers in prompts.

    Raises:
        InputError: there are fewer than `num` with an answer.
    """
    questions = {problem.folded for problem in posed}
    solved = draw_solved(source, num=2 * num + 8, seed=seed)
    fitting = [each for each in solved if each.folded not in questions]
    if len(fitting) < num:
        raise InputError(
            f"few-shot: expected {num} solved problems in {source} besides those that are posed, "
            f"got {len(fitting)}. Fix: --examples with other data, or a smaller --num"
        )
    return fitting[:num]


def draw_solved(source: str, *, num: int, seed: int) -> list[Problem]:
    """Return problems with an answer, to show in prompts; pure but for reading.

    Of a task they are `num`, drawn from a seed far from that of the problems. Of data they are all
    records for training, or where none is marked as held out, all; in the order of a draw, unless
    there are at most `num`: whoever wrote or chose so few has put them in order.
    """
    rule = parse_rule("end")
    if is_data(source):
        trained, _ = _read_rows(source)
        problems = [_to_problem(row, rule) for row in trained]
        if len(problems) > num:
            random.Random(seed).shuffle(problems)  # noqa: S311 -- no secret
    else:
        problems = list(_make_task(source, num=num, seed=seed + _EXAMPLE_SEEDS, rule=rule))
    return [problem for problem in problems if problem.answer]


def find_result(answer: str, rule: Rule) -> str:
    """Return a right answer without its working, where the rule or a marker tells it."""
    found = rule.find(answer)
    if found is None or found.strip() == answer.strip():
        found = find_marked(answer)
    return (found or answer).strip()


def digest_messages(messages: Iterable[Mapping[str, Any]]) -> str:
    """Return the SHA-256 of messages, as hex."""
    return digest_of({"messages": [dict(message) for message in messages]})


def is_data(source: str) -> bool:
    """Return whether a text names data: a path, or a hub id; a task has no slash or dot."""
    name = source.partition(":")[0]
    return Path(source).exists() or Path(name).exists() or bool({"/", "."} & set(name))


def _make_task(task: str, *, num: int, seed: int, rule: Rule) -> Iterator[Problem]:
    gym = require("reasoning_gym", extra="demo", purpose="a task of reasoning-gym")
    name, _, text = task.partition(":")
    try:
        settings = dict(_parse_setting(part) for part in text.split(",") if part)
        made: Any = gym.create_dataset(name, size=num, seed=seed, **settings)
        items = [made[index] for index in range(num)]
    except Exception as error:  # generators raise anything on settings that they do not expect
        names = _task_names()
        known = "" if name in names else ", or a file that exists"
        near = [] if name in names else get_close_matches(name, names, n=1)
        fix = f". Fix: {near[0]}" if near else ""
        raise InputError(
            f"task {task!r}: expected a task of reasoning-gym such as chain_sum, or with settings "
            f"chain_sum:min_terms=2,max_terms=2{known}: {error}{fix}"
        ) from error

    def verifier(item: Mapping[str, Any]) -> Callable[[str], float]:
        return lambda answer: float(made.score_answer(answer=answer, entry=item))

    for index, item in enumerate(items):
        answer = item["answer"]
        yield Problem(
            id=f"{name}-{seed}-{index}",
            question=str(item["question"]),
            answer="" if answer is None else str(answer),
            result="" if answer is None else str(answer),
            rule=rule,
            metadata=item["metadata"],
            verify=verifier(item),
        )


def _task_names() -> list[str]:
    return list(require("reasoning_gym.factory", extra="demo", purpose="a task").DATASETS)


def _parse_setting(part: str) -> tuple[str, Any]:
    name, equals, value = part.partition("=")
    if not equals:
        raise ValueError(f"{part!r} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _read_data(source: str, rule: Rule, *, is_training: bool) -> list[Problem]:
    trained, held_out = _read_rows(source)
    if is_training:
        if not trained:
            raise InputError(
                f"{source}: expected records to train on, got {len(held_out):,} that are all held "
                "out. Fix: other data, or without their split"
            )
        return [_to_problem(row, rule) for row in trained]
    if trained and held_out:
        total = len(trained) + len(held_out)
        logger.info(f"{source}: {len(held_out):,} of {total:,} records are held out: these")
    return [_to_problem(row, rule) for row in held_out or trained]


def _read_rows(source: str) -> tuple[list[Row], list[Row]]:
    """Return the rows of data that are for training, and those that are marked held out."""
    trained, held_out = list[Row](), list[Row]()
    for shard in plan_shards(open_sources([source], DataSettings(), folder=cache_folder())):
        for row in read_shard(shard):
            if isinstance(row, BadRow):
                raise InputError(f"{row.where}: {row.problem}")
            (held_out if marks_held_out(row) else trained).append(row)
    if not trained and not held_out:
        raise MissingError(f"{source}: expected problems, got none")
    return trained, held_out


def _to_problem(row: Row, rule: Rule) -> Problem:
    before, question, answer = _read_row(row)
    if not question.strip():
        raise InputError(f"{row.where}: question: expected some text, got {question!a:.60}")
    metadata, origin = row.fields.get("metadata"), row.fields.get(PROVENANCE)
    right = origin.get("right") if isinstance(origin, Mapping) else ""
    return Problem(
        id=read_id(row),
        question=question,
        answer=answer,
        result=right if isinstance(right, str) else "",
        rule=rule,
        before=before,
        metadata=metadata if isinstance(metadata, Mapping) else {},
        group=read_group(row),
    )


def _read_row(row: Row) -> tuple[tuple[Mapping[str, Any], ...], str, str]:
    """Return the messages before the question, the question, and the right answer."""
    if kind_of(row.fields) == "" and isinstance(row.fields.get("prompt"), list):
        fields = {"messages": row.fields["prompt"], "answer": _read_field(row, ANSWER_KEYS)}
        row = replace(row, fields=fields)
    if kind_of(row.fields) in ("messages", "prompt and completion"):
        content = read_content(row, kind_of(row.fields))
        if isinstance(content, Completion):
            has_own = row.fields.get("answer") is not None
            answer = _read_field(row, ("answer",)) if has_own else content.completion
            return (), content.prompt, answer
        assert isinstance(content, Chat)
        return _split_chat(content.messages, row)
    return (), _read_field(row, QUESTION_KEYS), _read_field(row, ANSWER_KEYS)


def _split_chat(
    messages: Any,  # noqa: ANN401 -- messages of a chat
    row: Row,
) -> tuple[tuple[Mapping[str, Any], ...], str, str]:
    own = row.fields.get("answer")
    last = len(messages) - (messages[-1]["role"] != "user")
    if (
        not last > 0
        or messages[last - 1]["role"] != "user"
        or (own is None and last == len(messages))
    ):
        raise InputError(
            f"{row.where}: expected a user's question and then an assistant's answer, got "
            f"{', '.join(str(message['role']) for message in messages[-3:])}"
        )
    answer = str(messages[-1]["content"] or "") if own is None else _read_field(row, ("answer",))
    return tuple(messages[: last - 1]), str(messages[last - 1]["content"]), answer


def _read_field(row: Row, keys: tuple[str, ...]) -> str:
    key = next((key for key in keys if row.fields.get(key) is not None), "")
    if not key:
        raise InputError(
            f"{row.where}: expected messages, or {' or '.join(keys)}, got "
            f"{', '.join(map(str, list(row.fields)[:8])) or 'nothing'!a}"
        )
    value = row.fields[key]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return check_text(value, f"{row.where}: {key}")


def _with_unique_ids(problems: list[Problem]) -> list[Problem]:
    ids = Counter(problem.id for problem in problems)
    [(most, times)] = ids.most_common(1)
    if times > 1:
        raise InputError(f"id: expected each once, got {most!a:.80} {times} times. Fix: other ids")
    return problems


def _draw(problems: list[Problem], *, num: int, seed: int) -> list[Problem]:
    if len(problems) <= num:
        return problems
    kept = random.Random(seed).sample(range(len(problems)), num)  # noqa: S311 -- no secret
    return [problems[index] for index in sorted(kept)]


def _choose_rule(answers: list[str]) -> Rule:
    quantities = [get_quantity(answer) for answer in answers]
    if all(quantities):
        units = {quantity[1] for quantity in quantities if quantity} - {""}
        return parse_rule("last-number" if len(units) < 2 else "end")
    if all("\\boxed" in answer for answer in answers):
        return parse_rule("boxed")
    is_worked = all(_MARKER in each or len(each.split()) > 8 for each in answers)
    if is_worked and all(find_numbers(answer.strip().splitlines()[-1]) for answer in answers):
        return parse_rule("last-number")
    return parse_rule("end")
