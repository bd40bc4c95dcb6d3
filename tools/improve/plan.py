"""The commands of each round, as words after `carryon`. Pure."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from carryon.cache.settings import ForwardSettings

_TOLD_SHOTS = 8
"""Solved problems of round 1 that show the form of an answer where the base is told what it is."""
HINT = "The answer is {answer}."
"""Tells the base what is right."""
POSED_FOR_EXAMPLES, ANSWERS_FOR_EXAMPLES, EXAMPLE_SETS = 100, 4, 8
"""Problems answered under the instruction to find examples, answers to each, and sets to try."""
TEST_SEED = 1_000_001
"""A million from the default seed of the training problems."""


SHORT_ANSWERS = (
    *("--epochs", "6", "--learning-rate", "0.001"),
    *("--tokens-per-step", "384", "--sampled-softmax", "2048"),
)
"""How to train on some hundred of the base's own short answers: small steps, and few enough that
they are not learned by heart."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What all rounds have in common."""

    root: Path
    base: str
    tasks: Sequence[str]
    data: Sequence[str]
    rule: str
    num: int
    samples: int
    max_samples: int
    keep: int
    instruction: str
    shots: int
    hint: str
    temperature: float
    max_new_tokens: int
    chat_template_kwargs: Sequence[str]
    keep_cut: bool
    form_ratio: float
    task_seed: int
    test_num: int
    test_seed: int
    taps: Sequence[str]
    extract_config: str
    train_config: str
    engine: str
    batch_rows: int
    forward: ForwardSettings = field(default_factory=ForwardSettings)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values: all that decides the results."""
        return {**asdict(self), "root": "", "forward": self.forward.to_dict()}

    @property
    def store(self) -> Path:
        """Folder of the store, to which every round appends."""
        return self.root / "store"

    def folder(self, number: int) -> Path:
        """Return the folder of a round; 0 holds the answers of the base."""
        return self.root / f"round-{number}"

    def corpus(self, number: int) -> Path:
        """Return the corpus of a round."""
        return self.folder(number) / "corpus.jsonl"

    @property
    def examples(self) -> Path:
        """Own right answers, of which round 1 shows some before each question."""
        return self.folder(1) / "examples.jsonl"

    @property
    def shown(self) -> Path:
        """The set of them that was shown."""
        return self.folder(1) / "shown.jsonl"

    def hinted(self, number: int) -> Path:
        """Return the corpus of a round's base that was told the answers nothing has found."""
        return self.folder(number) / "hinted.jsonl"

    def carryon(self, number: int) -> Path:
        """Return the carry-on of a round."""
        return self.folder(number) / "run" / "carryon"

    def examples_argv(self) -> list[str]:
        """Return the command that samples from the instructed base what round 1 shows."""
        asked = ["--samples", str(min(ANSWERS_FOR_EXAMPLES, self.samples)), "--keep", "1"]
        asked += ["--instruction", self.instruction] if self.instruction else []
        asked += ["--form-ratio", f"{self.form_ratio:g}"] if self.form_ratio else []
        asked += ["--temperature", f"{self.temperature:g}"]
        num = min(POSED_FOR_EXAMPLES, self.num)
        return self._sample(1, self.examples, asked, num=num, seed=self.task_seed)

    def sample_argv(self, number: int, known: Sequence[Path]) -> list[str]:
        """Return the command that samples: from the instructed base, then from the carry-on."""
        asked = ["--samples", str(self.samples), "--keep", str(self.keep)]
        if number == 1 and self.shots:
            asked += ["--shots", str(self.shots), "--examples", str(self.examples)]
            asked += ["--example-sets", str(EXAMPLE_SETS), "--examples-out", str(self.shown)]
        elif number == 1:
            asked += ["--instruction", self.instruction] if self.instruction else []
        else:
            asked += ["--carryon", str(self.carryon(number - 1))]
        asked += _known(known)
        if self.max_samples > self.samples:
            asked += ["--max-samples", str(self.max_samples)]
        asked += ["--form-ratio", f"{self.form_ratio:g}"] if self.form_ratio else []
        asked += ["--temperature", f"{self.temperature:g}"]
        seed = self.task_seed + (number - 1) * self.num
        return self._sample(number, self.corpus(number), asked, num=self.num, seed=seed)

    def hinted_argv(self, number: int, known: Sequence[Path]) -> list[str]:
        """Return the command that tells the base the right answers that no round has found.

        Of tasks those of earlier rounds too; of data those of this round.
        """
        asked = ["--samples", "1", "--keep", "1", "--temperature", "0", "--unsolved"]
        asked += ["--hint", self.hint, "--shots", str(self.shots or _TOLD_SHOTS)]
        asked += ["--examples", str(self.shown if self.shots else self.corpus(1)), *_known(known)]
        rounds = 1 if self.data else number
        seed = self.task_seed + (number - rounds) * self.num
        return self._sample(number, self.hinted(number), asked, num=rounds * self.num, seed=seed)

    def extract_argv(self, number: int, corpora: Sequence[Path]) -> list[str]:
        """Return the command that extracts a round's corpora, behind those of earlier rounds."""
        argv = ["extract", "--base", self.base, "--data", *map(str, corpora)]
        argv += ["--out", str(self.store), *["--append"] * (number > 1)]
        argv += ["--taps", *self.taps] if self.taps else []
        argv += ["--config", self.extract_config] if self.extract_config else []
        return argv + self._template() + forward_argv(self.forward)

    def train_argv(self, number: int) -> list[str]:
        """Return the command that trains on the whole store."""
        argv = ["train", "--store", str(self.store), "--out", str(self.folder(number) / "run")]
        if self.train_config:
            argv += ["--config", self.train_config]
        else:
            argv += [*(["--taps", *self.taps] if self.taps else []), *SHORT_ANSWERS]
        return argv + forward_argv(self.forward, ("device",))

    def score_argv(self, number: int) -> list[str]:
        """Return the command that scores the test set: round 0 with the base."""
        arms = ["carryon"]
        if number == 0:
            arms = ["base", *[f"instruct:{self.instruction}"] * bool(self.instruction)]
        argv = ["score", "--base", self.base, *self._sources("--tasks", "--tasks")]
        argv += ["--carryon", str(self.carryon(number))] if number else []
        argv += ["--arms", *arms, "--num", str(self.test_num)]
        argv += ["--task-seed", str(self.test_seed)]
        argv += ["--max-new-tokens", str(self.max_new_tokens)]
        argv += ["--out", str(self.folder(number) / "answers.jsonl")]
        return argv + self._template() + self._engine() + forward_argv(self.forward)

    def _sample(
        self, number: int, out: Path, asked: Sequence[str], *, num: int, seed: int
    ) -> list[str]:
        # Problem i of a task is drawn from seed + i: rounds have different problems.
        argv = ["sample", "--base", self.base, *self._sources("--tasks", "--data")]
        argv += ["--num", str(num), "--task-seed", str(seed), "--seed", str(number), *asked]
        argv += ["--keep-cut"] * self.keep_cut
        argv += ["--max-new-tokens", str(self.max_new_tokens), "--drop-long"]
        argv += ["--test-num", str(self.test_num), "--test-seed", str(self.test_seed)]
        argv += ["--out", str(out), *self._template(), *self._engine()]
        return argv + forward_argv(self.forward)

    def _sources(self, tasks: str, data: str) -> list[str]:
        argv = [tasks, *self.tasks] if self.tasks else []
        argv += [data, *self.data] if self.data else []
        return argv + (["--rule", self.rule] if self.rule != "auto" else [])

    def _template(self) -> list[str]:
        given = self.chat_template_kwargs
        return ["--chat-template-kwargs", *given] if given else []

    def _engine(self) -> list[str]:
        engine = ["--engine", self.engine] if self.engine != "auto" else []
        return [*engine, "--batch-rows", str(self.batch_rows)]


def forward_argv(forward: ForwardSettings, only: Sequence[str] = ()) -> list[str]:
    """Return the options of the base that are not the defaults; of some names only, if given."""
    usual, argv = asdict(ForwardSettings()), list[str]()
    for name, value in asdict(forward).items():
        if value == usual[name] or (only and name not in only):
            continue
        flag = f"--{name.replace('_', '-')}"
        values = value if isinstance(value, list) else [value]
        argv += [flag] if value is True else [flag, *map(str, values)]
    return argv


def _known(paths: Sequence[Path]) -> list[str]:
    return ["--known", *map(str, paths)] if paths else []
