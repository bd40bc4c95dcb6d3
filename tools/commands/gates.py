"""`carryon gates`: which base of a mixture each token of a sample leaned on, as a page."""

from typing import TYPE_CHECKING, Any

from carryon.cache.errors import CarryOnError, InputError
from carryon.tools.cli.output import print_result, visible

if TYPE_CHECKING:
    from carryon.cache.store.reader import Store
    from carryon.train.inference.token_shares import TokenShares


def gates(
    *,
    store: str,
    mix: list[str],
    carryon: str,
    sample: str,
    out: str = "gates.html",
    device: str = "auto",
) -> dict[str, Any]:
    """Show which base each token of a sample leaned on, as a page of HTML.

    A mixture has a gate, which gives each base a share before the next token is known. The page
    shows the base with the largest share as background, the one that gave most of the token's
    probability as underline, and all numbers on hover. It is one file and needs no network.

    A sample of the store that the gate was trained on takes seconds; for another store its
    projections are computed first and cached. The last line on stdout is a JSON line.

    Example:
        carryon gates --store store --mix qwen --carryon run/carryon --sample 0 --out gates.html

    Args:
        store: Folder of the anchor's store.
        mix: Stores of the other bases that the gate was trained with, each aligned to --store.
        carryon: Folder of a carry-on with a gate, or its id on the hub.
        sample: Id or number, counted from 0, of the sample.
        out: File for the page.
        device: `auto` (an accelerator if there is one), `cpu`, `cuda`, `cuda:1`, ...
    """
    from carryon.cache.store.reader import Store
    from carryon.tools.cli.places import check_page, write_page
    from carryon.tools.commands.pages.gates import make_gate_page
    from carryon.tools.commands.pages.shown_samples import index_of
    from carryon.train.inference.token_shares import measure_token_shares

    if not mix:
        raise InputError("--mix: expected the stores of the other bases, got none")
    check_page(out, name="--out")
    opened = Store.open(store)
    index = index_of(opened, sample)
    shares = measure_token_shares(opened, index, carryon=carryon, mix=mix, device=device)
    title = f"Sample {shares.id} of {opened.name}: {' and '.join(shares.names)}"
    page = make_gate_page(shares, names=_special_names(opened, shares), title=title)
    write_page(out, page, name="--out")
    means = {
        kind: {name: float(value) for name, value in zip(shares.names, values, strict=True)}
        for kind, values in (
            ("gate_shares", shares.gate.mean(axis=0)),
            ("target_shares", shares.parts.mean(axis=0)),
        )
    }
    shown = ", ".join(f"{name} {value:.3f}" for name, value in means["gate_shares"].items())
    return print_result(
        {
            "sample": shares.id,
            "targets": len(shares.targets),
            "nll": float(shares.losses.mean()),
            "carryon_nll": float(shares.carryon_losses.mean()),
            **means,
            "page": out,
        },
        visible(f"{shares.id}: shares of the gate: {shown}; page: {out}"),
    )


def _special_names(store: "Store", shares: "TokenShares") -> list[str]:
    """Return the name of each special token, empty for the others."""
    from carryon.cache.base.facts import read_facts
    from carryon.cache.base.recorded import recorded_source

    special = {
        token
        for token, text in zip(shares.tokens.tolist(), shares.spelled, strict=True)
        if text is None
    }
    names = {token: f"token {token}" for token in special}
    if special:
        try:
            tokenizer = read_facts(recorded_source(store.base, where=store.root)).tokenizer
        except CarryOnError:  # its numbers will do
            return [names.get(token, "") for token in shares.tokens.tolist()]
        for token in special:
            names[token] = str(tokenizer.convert_ids_to_tokens(token) or names[token])
    return [names.get(token, "") for token in shares.tokens.tolist()]
