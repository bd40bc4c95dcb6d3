"""Extraction by a served engine: the store, requests, retries, resume, and each wrong answer."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_server import Tensors, TinyServer, serving
from support.tiny_stores import write_corpus

from carryon.cache.base.model import Base
from carryon.cache.errors import EngineError, InputError, SettingMismatchError, UnsafePathError
from carryon.cache.exchange.engine import endpoint, requests
from carryon.cache.exchange.engine.endpoint import Endpoint, parse_url
from carryon.cache.exchange.engine.extraction import run_with_vllm
from carryon.cache.exchange.engine.planning import plan_with_vllm
from carryon.cache.exchange.engine.settings import VllmSettings
from carryon.cache.exchange.engine.told_files import ToldFiles
from carryon.cache.extraction.pipeline import extract
from carryon.cache.extraction.repair import repair
from carryon.cache.extraction.report import ExtractReport
from carryon.cache.extraction.sharing.workers import Sharing
from carryon.cache.format.zarr_metadata import receipt_path
from carryon.cache.settings import CorpusSettings, DataSettings, ForwardSettings, StoreSettings
from carryon.cache.store.reader import Store
from carryon.cache.store.verify import verify

TAPS = ["final", "prenorm", "layer.0", "layer.1"]
NUM_FIRST = 9
"""Prompts before those of the units: the one that the columns are read from, and eight checked."""


@pytest.fixture
def server(
    tiny_base: Base, store_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[TinyServer]:
    """A server of the tiny base; waits between tries are short."""
    monkeypatch.setattr(requests, "_FIRST_WAIT_S", 0.01)
    with serving(tiny_base, store_tmp / "served") as server:
        yield server


@pytest.fixture
def corpus(store_tmp: Path) -> Path:
    """Texts of many lengths."""
    return write_corpus(store_tmp / "texts.jsonl", num_samples=12)


def extract_served(
    server: TinyServer,
    base: Base,
    corpus: Path,
    out: Path,
    *,
    append: bool = False,
    limit: int | None = None,
    sharing: Sharing | None = None,
    **options: Any,  # noqa: ANN401
) -> ExtractReport:
    """Extract from a server; options of VllmSettings and StoreSettings."""
    names = VllmSettings.__dataclass_fields__
    vllm = {name: options.pop(name) for name in list(options) if name in names}
    vllm = {"states_folder": str(server.folder), "retries": 3} | vllm  # minutes for a slow machine
    plan = plan_with_vllm(
        base=base,
        data=[str(corpus)],
        out=out,
        vllm=VllmSettings(**vllm),
        endpoint=server.url,
        corpus=CorpusSettings(max_tokens=60),
        store=StoreSettings(**{"taps": TAPS, "unit_tokens": 64, **options}),
        forward=ForwardSettings(),
        data_settings=DataSettings(),
        is_shared=sharing is not None,
    )
    return run_with_vllm(plan, append=append, max_disk_bytes=limit, sharing=sharing)


def test_a_served_store_is_that_of_the_base(
    server: TinyServer, tiny_base: Base, corpus: Path, store_tmp: Path
) -> None:
    report = extract_served(server, tiny_base, corpus, store_tmp / "store")
    assert report.is_finished
    own = extract(
        base=tiny_base,
        data=[str(corpus)],
        out=store_tmp / "own",
        taps=TAPS,
        unit_tokens=64,
        max_tokens=60,
    )
    store = Store.open(store_tmp / "store")
    assert report.num_units == own.num_units > 2
    for unit in range(own.num_units):
        expected, got = own.read_unit(unit), store.read_unit(unit)
        assert np.array_equal(expected.tokens, got.tokens)
        for tap in TAPS:  # batches differ, and with them the last bit; `final` is rounded twice
            rtol = 2**-5 if tap == "final" else 2**-7
            np.testing.assert_allclose(got.float32(tap), expected.float32(tap), rtol, atol=2**-7)
    assert verify(store_tmp / "store", depth="full").is_complete
    assert store.manifest.forward["engine"] == "vllm"
    assert store.manifest.forward["layer_ids"] == "0 1 2"
    assert "norm" in store.manifest.forward["final"]
    assert store.manifest.versions["vllm"] == "0.32.0"
    assert store.manifest.profile_error["prenorm"]["channel_relative_error"] > 0
    assert not list(server.folder.iterdir())


def test_requests_are_token_ids_bounded_and_salted(
    server: TinyServer, tiny_base: Base, corpus: Path, store_tmp: Path
) -> None:
    extract_served(server, tiny_base, corpus, store_tmp / "store", requests=3)
    store = Store.open(store_tmp / "store")
    samples = [
        store.read_unit(unit).sample(number, sample_id="").tokens.tolist()
        for unit in range(store.num_units)
        for number in store.unit_samples(unit)
    ]
    assert sorted(server.prompts[NUM_FIRST:]) == sorted(samples)
    assert server.most_in_flight <= 3
    assert len(set(server.salts)) == len(server.prompts)


@pytest.mark.parametrize("fault", ["500", "503", "429", "408", "hang up", "lost", "late"])
def test_a_request_that_fails_is_sent_again(
    server: TinyServer,
    tiny_base: Base,
    corpus: Path,
    store_tmp: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
) -> None:
    if fault == "lost":  # other files are written before they are told
        monkeypatch.setattr(endpoint, "_FILE_WAIT_S", 0.05)
    server.faults = dict.fromkeys((NUM_FIRST + 1, NUM_FIRST + 4), fault)
    report = extract_served(server, tiny_base, corpus, store_tmp / "store", requests=2)
    assert report.is_finished
    assert verify(store_tmp / "store", depth="full").is_complete
    again = 0 if fault == "late" else 2
    assert len(server.prompts) == NUM_FIRST + Store.open(store_tmp / "store").num_samples + again


def test_tries_end(server: TinyServer, tiny_base: Base, corpus: Path, store_tmp: Path) -> None:
    server.faults = dict.fromkeys(range(NUM_FIRST + 3, 1000), "503")
    with pytest.raises(EngineError, match=r"expected an answer, got 503 'told to fail' after 4 "):
        extract_served(server, tiny_base, corpus, store_tmp / "store")


def test_a_refusal_is_not_tried_again(
    server: TinyServer, tiny_base: Base, corpus: Path, store_tmp: Path
) -> None:
    server.faults = {NUM_FIRST: "400"}
    with pytest.raises(EngineError, match=r"got 400 'told to fail'. Fix"):
        extract_served(server, tiny_base, corpus, store_tmp / "store", requests=1)
    assert len(server.prompts) == NUM_FIRST + 1


def test_files_that_nobody_reads_are_removed(
    server: TinyServer, tiny_base: Base, corpus: Path, store_tmp: Path
) -> None:
    server.change, _ = WRONG["not finite"]
    with pytest.raises(InputError, match="expected finite states"):
        extract_served(server, tiny_base, corpus, store_tmp / "store", requests=8)
    assert len(server.prompts) > NUM_FIRST + 4
    assert not list(server.folder.iterdir())


def test_a_stopped_extraction_resumes_by_receipts(
    server: TinyServer, tiny_base: Base, corpus: Path, store_tmp: Path
) -> None:
    out = store_tmp / "store"
    server.faults = dict.fromkeys(range(NUM_FIRST + 6, 1000), "400")
    with pytest.raises(EngineError):
        extract_served(server, tiny_base, corpus, out, requests=1)
    assert not list(server.folder.iterdir())
    done = len(list((out / "units").glob("*.json"))) - 1
    server.faults, before = {}, len(server.prompts)
    report = extract_served(server, tiny_base, corpus, out, requests=1)
    assert done > 0
    assert report.computed_units == report.num_units - done
    assert len(server.prompts) - before < NUM_FIRST + Store.open(out).num_samples
    whole = extract_served(server, tiny_base, corpus, store_tmp / "whole")
    assert whole.fingerprint == report.fingerprint
    for unit in range(report.num_units):
        first, second = (Store.open(path).read_unit(unit) for path in (out, store_tmp / "whole"))
        for tap in TAPS:
            assert np.array_equal(first.hidden[tap], second.hidden[tap])


def test_samples_are_appended_and_shared(
    server: TinyServer, tiny_base: Base, corpus: Path, store_tmp: Path
) -> None:
    extract_served(server, tiny_base, corpus, store_tmp / "store")
    more = write_corpus(store_tmp / "more.jsonl", num_samples=5, first=100)
    sharing = Sharing(workers=1, forward=ForwardSettings())
    report = extract_served(
        server, tiny_base, more, store_tmp / "store", append=True, sharing=sharing
    )
    assert report.is_finished
    assert verify(store_tmp / "store", depth="full").is_complete


def test_another_engine_setting_is_refused_on_resume(
    server: TinyServer, tiny_base: Base, corpus: Path, store_tmp: Path
) -> None:
    extract_served(server, tiny_base, corpus, store_tmp / "store", taps=["final"])
    server.layers = (0, 2)
    with pytest.raises(SettingMismatchError, match="layer_ids: expected 0 1 2"):
        extract_served(server, tiny_base, corpus, store_tmp / "store", taps=["final"])
    with pytest.raises(SettingMismatchError, match="attention|compute_dtype"):
        extract(
            base=tiny_base,
            data=[str(corpus)],
            out=store_tmp / "store",
            taps=["final"],
            unit_tokens=64,
            max_tokens=60,
        )


def test_a_damaged_unit_is_extracted_again(
    server: TinyServer, tiny_base: Base, corpus: Path, store_tmp: Path
) -> None:
    out = store_tmp / "store"
    extract_served(server, tiny_base, corpus, out)
    shard = out / "hidden/final/c/0/0"
    shard.write_bytes(b"\0" * shard.stat().st_size)
    with pytest.raises(InputError, match="run the same carryon import or extract again"):
        repair(out, base=tiny_base)
    (out / receipt_path(0)).unlink()
    assert extract_served(server, tiny_base, corpus, out).computed_units == 1
    assert verify(out, depth="full").is_complete


def _replaced(name: str, change: Any) -> Any:  # noqa: ANN401
    def apply(number: int, tensors: Tensors) -> Tensors:
        return tensors | {name: change(tensors[name])} if number > NUM_FIRST else tensors

    return apply


STATES, TOKENS = "hidden_states", "token_ids"
WRONG = {
    "other tokens": (_replaced(TOKENS, lambda x: x.flip(0)), "expected the token ids of the"),
    "fewer rows": (
        lambda number, t: {k: v[1:].clone() for k, v in t.items()} if number > NUM_FIRST else t,
        "tokens: expected",
    ),
    "fewer rows than tokens": (_replaced(STATES, lambda x: x[1:].clone()), "prefix cach"),
    "equal columns": (
        _replaced(STATES, lambda x: x[:, [0, 1, 1]].clone()),
        "equal columns 1 and 2",
    ),
    "a column more": (_replaced(STATES, lambda x: x[:, [0, 1, 2, 0]].clone()), "columns, one for"),
    "not finite": (_replaced(STATES, lambda x: x * torch.nan), "expected finite states"),
    "another dtype": (
        _replaced(STATES, lambda x: x.float()),
        "dtype: expected bfloat16, got float32",
    ),
    "another width": (_replaced(STATES, lambda x: x[..., :8].clone()), "width: expected 16, got 8"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_refused_by_name(
    server: TinyServer, tiny_base: Base, corpus: Path, store_tmp: Path, name: str
) -> None:
    server.change, says = WRONG[name]
    with pytest.raises(InputError, match=says) as caught:
        extract_served(server, tiny_base, corpus, store_tmp / "store", requests=1)
    assert f"{server.folder}/cmpl-" in str(caught.value)
    assert "Fix: " in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ((0, 2, 1), "expected ascending ids"),
        ((0, 1, 3), "expected ids from 0 to 2"),
        ((0, 1), "expected some of"),
    ],
)
def test_wrong_layer_ids_are_refused(
    server: TinyServer,
    tiny_base: Base,
    corpus: Path,
    store_tmp: Path,
    layers: tuple[int, ...],
    says: str,
) -> None:
    server.names_layers = False
    server.layers = tuple(range(len(layers)))
    with pytest.raises(InputError, match=says):
        extract_served(server, tiny_base, corpus, store_tmp / "store", layer_ids=list(layers))
    assert not (store_tmp / "store/zarr.json").exists()


def test_states_of_other_layers_are_refused(
    server: TinyServer, tiny_base: Base, corpus: Path, store_tmp: Path
) -> None:
    server.names_layers = False
    server.layers = (0, 2)
    with pytest.raises(InputError, match="expected the base's states at layer.1"):
        extract_served(
            server, tiny_base, corpus, store_tmp / "store", layer_ids=[0, 1], taps=["layer.1"]
        )


@pytest.mark.parametrize("fault", ["no path", "outside"])
def test_a_path_that_is_no_file_of_states_is_refused(
    server: TinyServer, tiny_base: Base, corpus: Path, store_tmp: Path, fault: str
) -> None:
    server.faults = {0: fault}
    with pytest.raises(EngineError, match="expected the name of a file of states"):
        extract_served(server, tiny_base, corpus, store_tmp / "store")


MINE = "mine.safetensors"


@pytest.mark.parametrize("name", [MINE, f"{MINE}.lock"])
def test_a_file_that_was_there_before_the_request_stays(server: TinyServer, name: str) -> None:
    server.faults = {1: MINE}
    vllm = VllmSettings(states_folder=str(server.folder), requests=1)
    with Endpoint(server.url, model="tiny", longest=9, vllm=vllm) as engine:
        engine.discard(engine.submit([1, 2]).result())
        (server.folder / name).write_bytes(b"another's")
        with pytest.raises(EngineError, match=f"new file of states, got {MINE}, which was there"):
            engine.submit([1, 2, 3]).result()
    assert [path.name for path in server.folder.iterdir()] == [name]


def test_a_file_is_told_for_one_prompt_alone(server: TinyServer) -> None:
    server.faults = {1: "cmpl-0-0a1b.safetensors"}
    vllm = VllmSettings(states_folder=str(server.folder), requests=1)
    with Endpoint(server.url, model="tiny", longest=9, vllm=vllm) as engine:
        asked = [engine.submit([1, 2]), engine.submit([1, 2])]
        name = asked[0].result()
        with pytest.raises(EngineError, match="which was there"):
            asked[1].result()
        assert (server.folder / name).is_file()


def test_leaving_does_not_wait_for_a_server_that_is_silent(
    server: TinyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by Ctrl-C: a request may take ten minutes, and its answer is of no more use."""
    monkeypatch.setattr(endpoint, "_END_S", 0.05)
    server.faults = dict.fromkeys((0, 1), "silent")
    vllm = VllmSettings(states_folder=str(server.folder), requests=2)
    engine = Endpoint(server.url, model="tiny", longest=9, vllm=vllm).__enter__()
    asked = [engine.submit([1, 2]), engine.submit([3])]
    while len(server.prompts) < 2:
        time.sleep(0.01)
    leaving = threading.Thread(target=engine.__exit__, daemon=True)
    leaving.start()
    leaving.join(60)
    is_left = not leaving.is_alive()
    server.may_end.set()
    leaving.join()
    assert is_left
    assert all(isinstance(each.exception(), EngineError) for each in asked)
    assert len(server.prompts) == 2, "nothing is asked again"


def _trickle(listener: socket.socket, seconds: float) -> None:
    """Answer one request a byte at a time."""
    link, _ = listener.accept()
    with link:
        link.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n{")
        end = time.monotonic() + seconds
        with suppress(OSError):  # it is no longer read
            while time.monotonic() < end:
                link.sendall(b" ")
                time.sleep(0.01)


def test_an_answer_that_comes_a_byte_at_a_time_is_not_waited_for_without_end(
    tmp_path: Path,
) -> None:
    vllm = VllmSettings(states_folder=str(tmp_path), request_timeout_s=0.3, retries=0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        answering = threading.Thread(target=_trickle, args=(listener, 20.0))
        answering.start()
        with (
            pytest.raises(EngineError, match=r"/version: .*not whole within 0.3 s"),
            Endpoint(url, model="tiny", longest=9, vllm=vllm),
        ):
            pass
        answering.join()


def test_a_folder_in_place_of_a_file_of_states_is_refused_and_stays(
    server: TinyServer, tiny_base: Base, corpus: Path, store_tmp: Path
) -> None:
    server.faults = {0: MINE}
    server.on_prompt = lambda number: (server.folder / MINE).mkdir(exist_ok=True)
    with pytest.raises(UnsafePathError, match="expected a file, got a folder"):
        extract_served(server, tiny_base, corpus, store_tmp / "store")
    assert (server.folder / MINE).is_dir()


def test_a_file_that_cannot_be_removed_is_named(tmp_path: Path) -> None:
    files = ToldFiles(tmp_path)
    files.take(MINE, look=files.look())
    (tmp_path / MINE).mkdir()
    with pytest.raises(EngineError, match=rf"{MINE}: expected a file that can be removed.*Fix: "):
        files.remove(MINE)


@pytest.mark.parametrize(
    "version", ["0.32\ud800", "0.32\nerror: all is lost", "\x1b[31m", "v" * 999]
)
def test_any_text_may_be_a_servers_version(
    server: TinyServer, tiny_base: Base, corpus: Path, store_tmp: Path, version: str
) -> None:
    server.version = version
    assert extract_served(server, tiny_base, corpus, store_tmp / "store").is_finished
    kept = Store.open(store_tmp / "store").manifest.versions["vllm"]
    assert kept.isascii()
    assert kept.isprintable()
    assert len(kept) <= 40


def test_a_folder_that_is_not_the_servers_is_named(
    server: TinyServer,
    tiny_base: Base,
    corpus: Path,
    store_tmp: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(endpoint, "_FILE_WAIT_S", 0.05)
    server.faults = {0: "lost"}
    with pytest.raises(EngineError, match="--states-folder .*: expected the file cmpl-0"):
        extract_served(server, tiny_base, corpus, store_tmp / "store")


def test_a_server_without_room_is_named(
    server: TinyServer, tiny_base: Base, corpus: Path, store_tmp: Path
) -> None:
    server.max_model_len = 20
    with pytest.raises(InputError, match="got max_model_len 20. Fix: serve with --max-model-len"):
        extract_served(server, tiny_base, corpus, store_tmp / "store")


def test_nobody_answers(server: TinyServer, tiny_base: Base, corpus: Path, store_tmp: Path) -> None:
    server.url = "http://127.0.0.1:1"
    with pytest.raises(EngineError, match=r"no answer \(.*refused.*after 4 tries"):
        extract_served(server, tiny_base, corpus, store_tmp / "store")


@pytest.mark.parametrize(
    "url", ["", "127.0.0.1:8000", "ftp://a", "http://", "http://a:x", "http://a?b", "http://a..b"]
)
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(InputError, match="--endpoint: expected http://HOST:PORT"):
        parse_url(url)


def test_an_address_may_end_as_that_of_clients_does() -> None:
    assert parse_url("http://a:1/v1/") == parse_url("http://a:1")


def test_options_of_the_other_way_are_refused(
    server: TinyServer, tiny_base: Base, corpus: Path, store_tmp: Path
) -> None:
    with pytest.raises(InputError, match="--vllm-args: expected it for vLLM that is started here"):
        extract_served(server, tiny_base, corpus, store_tmp / "store", vllm_args=["a=1"])
    with pytest.raises(InputError, match="--states-folder: expected the folder"):
        extract_served(server, tiny_base, corpus, store_tmp / "store", states_folder="")


@pytest.mark.parametrize(
    ("settings", "option"),
    [
        ({"quantize": "nf4"}, "--quantize nf4"),
        ({"device_map": "auto"}, "--device-map"),
        ({"trust_remote_code": True}, "--trust-remote-code"),
    ],
)
def test_a_base_that_vllm_would_load_in_another_way_is_refused(
    settings: dict[str, Any], option: str, tiny_base_folder: Path, corpus: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=f"^{option}: expected it for --backend transformers"):
        plan_with_vllm(
            base=str(tiny_base_folder),
            data=[str(corpus)],
            out=tmp_path / "store",
            vllm=VllmSettings(states_folder=str(tmp_path)),
            endpoint="http://localhost:9",
            corpus=CorpusSettings(),
            store=StoreSettings(),
            forward=ForwardSettings(**settings),
            data_settings=DataSettings(),
        )
    assert not (tmp_path / "store").exists()
