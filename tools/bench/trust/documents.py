"""Documents that a stranger may have written, and the commands that read each."""

import contextlib
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from carryon.tools.bench.trust.calls import call
from carryon.tools.bench.trust.mutations import HUGE, LINKED, change_content, change_entry
from carryon.tools.bench.trust.signing import name_base, sign, sign_base
from carryon.tools.bench.trust.table import COMMANDS, Things

_STEPS = "--width 8 --blocks 1 --heads 2 --intermediate-size 8 --tokens-per-step 512 --epochs 1"
_RUN = f"{_STEPS} --learning-rate 0.01 --device cpu"
_ASKED = "--prompt x --max-new-tokens 2 --device cpu"
_UPDATE = "update --lineage lineage --data little.jsonl --base base"
_EXTRACT = "--unit-tokens 512 --tokenizer-workers 1"
_SHARE_OF_ENTRIES = 0.08
_SHARE_OF_UNSIGNED = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Documents of one thing, and the commands that read them."""

    thing: str
    """Name of its folder or file."""
    documents: Mapping[str, str]
    """Pattern of paths below the folder -> form, as `change_content` takes it."""
    commands: Mapping[str, str]
    """Words behind `carryon` -> what they are to write; nothing else may change."""
    beside: tuple[str, ...] = ()
    """What else the commands read."""
    removed: tuple[str, ...] = field(default=())
    """Removed of every second one, so that the rest is read: a report that says all is done."""


GROUPS = [
    Group(
        thing="store",
        documents={
            "zarr.json": "json",
            "units/*.json": "json",
            "head/*/zarr.json": "json",
            "probe/**/zarr.json": "json",
            "samples/*/zarr.json": "json",
            "*/zarr.json": "json",
            "hidden/*/zarr.json": "json",
            "blocks/config.json": "json",
            "blocks/*.safetensors": "safetensors",
            "skipped.jsonl": "jsonl",
        },
        commands={
            "verify store --full": "",
            "inspect store": "",
            "inspect store --sample 0 --html page.html": "page.html",
            "evaluate --store store --carryon carryon --device cpu": "",
            f"train --store store --out new {_RUN}": "new",
            "update --lineage known --store store": "known",
            "repair store": "store",
            COMMANDS["append"].text.replace("second", "third") + " --bad-rows skip": "store",
        },
        beside=("base", "carryon", "known", "third.jsonl"),
    ),
    Group(
        thing="carryon",
        documents={"carryon.json": "json", "README.md": "text", "*.safetensors": "safetensors"},
        commands={
            "verify carryon": "",
            "evaluate --store store --carryon carryon --device cpu": "",
            f"generate --carryon carryon --base base {_ASKED}": "",
            f"generate --carryon carryon {_ASKED}": "",
            "evaluate --store store --carryon carryon --device cpu --alpha 0:1:1 --write-alpha": (
                "carryon"
            ),
        },
        beside=("store", "base"),
    ),
    Group(
        thing="top",
        documents={"carryon.json": "json", "*.safetensors": "safetensors"},
        commands={
            f"generate --carryon top {_ASKED}": "",
            "merge --carryon top --out merged --device cpu": "merged",
        },
        beside=("base",),
    ),
    Group(
        thing="run",
        documents={
            "*.json": "json",
            "checkpoints/*.json": "json",
            "checkpoints/*/state.json": "json",
            "checkpoints/*/*.safetensors": "safetensors",
            "config.yaml": "yaml",
            "*.jsonl": "jsonl",
            "carryon/carryon.json": "json",
        },
        commands={"verify run": "", f"train --store store --out run {_RUN}": "run"},
        beside=("store",),
        removed=("result.json", "carryon"),
    ),
    Group(
        thing="sweep",
        documents={
            "sweep.json": "json",
            "seed=1/*.json": "json",
            "seed=1/*.yaml": "yaml",
            "seed=1/checkpoints/*/state.json": "json",
        },
        commands={f"sweep --store store --out sweep {_RUN} --vary seed=1,2": "sweep"},
        beside=("store",),
        removed=("sweep.json", "seed=1/result.json"),
    ),
    Group(
        thing="lineage",
        documents={
            "*.json": "json",
            "config.yaml": "yaml",
            "trunk/0001-head/*.json": "json",
            "trunk/0001-head/*.jsonl": "jsonl",
            "trunk/0001-head/checkpoints/*/state.json": "json",
            "versions/0001/*.json": "json",
            "versions/0001/carryon/carryon.json": "json",
            "versions/0001/config.yaml": "yaml",
            "store/zarr.json": "json",
        },
        commands={
            "verify lineage": "",
            "versions --lineage lineage --device cpu": "lineage",
            "versions --lineage lineage --device cpu --rebuild 1 --out rebuilt": "rebuilt",
            _UPDATE: "lineage",
        },
        beside=("base", "little.jsonl"),
        removed=("versions.json", "versions/0001/result.json"),
    ),
    Group(
        thing="base",
        documents={
            "config.json": "json",
            "tokenizer_config.json": "json",
            "tokenizer.json": "json",
            "generation_config.json": "json",
            "chat_template.jinja": "text",
            "model.safetensors": "safetensors",
        },
        commands={
            f"generate --carryon carryon {_ASKED} --chat true": "",
            "merge --carryon top --out merged --device cpu": "merged",
            "repair store": "store",
        },
        beside=("carryon", "top", "store"),
    ),
    Group(
        thing="corpus",
        documents={"*.jsonl": "jsonl", "*.csv": "text"},
        commands={
            "preview --base base --data corpus --html page.html": "page.html",
            f"extract --base base --data corpus --out fresh {_EXTRACT}": "fresh",
            f"extract --base base --data corpus --out fresh {_EXTRACT} --bad-rows skip": "fresh",
        },
        beside=("base",),
    ),
]
"""Each kind of document of each kind of thing."""
_ORDER = [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 1, 2, 6, 7]
"""Which groups take turns: those whose commands take longest come once."""

_CORPORA = {
    "chats.jsonl": [
        '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "A"}]}',
        '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "B"}]}',
    ],
    "pairs.jsonl": ['{"prompt": "one and", "chosen": " two", "rejected": " three"}'] * 2,
    "texts.jsonl": ['{"text": "the thing in the ring", "id": "t-1"}', '{"text": "the king"}'],
    "prompts.jsonl": ['{"id": "p", "prompt": "the", "completion": " ring", "split": "held-out"}'],
    "rows.csv": ["prompt,completion", "the king, in the ring", "the thing, on the king"],
}


def make_given(things: Things, folder: Path) -> None:
    """Make what is changed in `folder`, from what the table of commands has made."""
    for name in ("base", "carryon", "top"):
        place = things.folder / name
        (shutil.copytree if place.is_dir() else shutil.copy)(place, folder / name)
    _write_corpora(folder)
    for text in (
        "extract --base base --data first.jsonl --out store --unit-tokens 128 --bad-rows skip "
        "--taps final layer.1 --with-blocks 1",
        f"train --store store --out run {_RUN} --checkpoint-every 2 --evaluate-every 2",
        f"sweep --store store --out sweep {_RUN} --vary seed=1,2",
        f"update --lineage lineage --data first.jsonl --base base --bad-rows skip "
        f"{_RUN} --tokens-per-step 128",
        "versions --lineage lineage --device cpu",
        f"update --lineage known --store store {_RUN} --tokens-per-step 128",
    ):
        ended = call(text.split(), cwd=folder)
        if ended.code:
            raise RuntimeError(f"carryon {text} ended with code {ended.code}: {ended.err}")
    for path in ("carryon/carryon.json", "top/carryon.json", "store/zarr.json"):
        name_base(folder / path, "base")


def group_of(number: int) -> Group:
    """Return the group of which a document of the number `number` is."""
    return GROUPS[_ORDER[number % len(_ORDER)]]


def make_hostile(given: Path, folder: Path, number: int) -> tuple[str, str]:
    """Copy a thing with what stands beside it into `folder`, and change one of its documents.

    Returns:
        The document and the change.
    """
    picks = random.Random(number)
    group = group_of(number)
    copy_things(group, given, folder)
    root = folder / group.thing
    if picks.random() < 0.5:
        for name in group.removed:
            (shutil.rmtree if (root / name).is_dir() else Path.unlink)(root / name)
    found = {pattern: sorted(root.glob(pattern)) for pattern in group.documents}
    pattern = picks.choice([pattern for pattern, paths in found.items() if paths])
    path, form = picks.choice(found[pattern]), group.documents[pattern]
    name = path.relative_to(folder).as_posix()
    if picks.random() < _SHARE_OF_ENTRIES:
        # A corpus of the user's may be as large as it is, and so may their folder be a link.
        without = [HUGE] * (group.thing == "corpus") + [LINKED] * (path.parent == root)
        return name, change_entry(path, picks, canary=folder / "canary", without=without)
    content, change = change_content(path.read_bytes(), form, picks)
    path.write_bytes(content.replace(b"CANARY", str(folder / "canary").encode()))
    if picks.random() < _SHARE_OF_UNSIGNED:
        return name, f"{change}, not signed"
    with contextlib.suppress(OSError):
        if group.thing == "base":
            sign_base(root, folder / "carryon/carryon.json", folder / "top/carryon.json")
            sign_base(root, folder / "store/zarr.json")
        else:
            _sign(root, path)
    return name, change


def _sign(root: Path, path: Path) -> None:
    """Sign a document in the thing that it belongs to, which may lie in another."""
    while (
        root != path.parent
        and not (root / "zarr.json").exists()
        and (root / "store") in path.parents
    ):
        root = root / "store"
    sign(root, path.relative_to(root).as_posix())


def copy_things(group: Group, given: Path, folder: Path) -> None:
    """Copy a thing, and what its commands read besides, into `folder`."""
    for name in (group.thing, *group.beside):
        place = given / name
        if place.is_dir():
            shutil.copytree(place, folder / name, symlinks=True)
        else:
            shutil.copy(place, folder / name)
    if group.thing == "base":  # so that it is needed
        _damage_shard(folder / "store")


def _damage_shard(store: Path) -> None:
    """Change a byte of hidden states, which `carryon repair` computes again."""
    path = store / "hidden/final/c/0/0"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _write_corpora(folder: Path) -> None:
    from carryon.tools.bench.trust.table import write_texts

    write_texts(folder / "first.jsonl", 0)
    with (folder / "first.jsonl").open("a") as file:
        file.write('{"id": "bad", "prompt": 3}\n')
    write_texts(folder / "third.jsonl", 3)
    lines = (folder / "third.jsonl").read_text().splitlines(keepends=True)
    (folder / "little.jsonl").write_text("".join(lines[:6]))
    (folder / "corpus").mkdir()
    for name, lines in _CORPORA.items():
        (folder / "corpus" / name).write_text("".join(f"{line}\n" for line in lines))
