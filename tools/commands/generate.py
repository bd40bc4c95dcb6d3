"""`carryon generate`: the answer of the customized model, and of its base beside it."""

from typing import Any

from carryon.cache.errors import InputError
from carryon.cache.settings import ForwardSettings
from carryon.tools.cli.output import visible
from carryon.tools.cli.table import side_by_side
from carryon.train.inference.generate_settings import GenerateSettings


def generate(
    *,
    carryon: str,
    prompt: str,
    base: str | None = None,
    alpha: float | None = None,
    compare: bool = False,
    mix: list[str] = [],  # noqa: B006 -- shown in the help, never changed
    mix_device: list[str] = [],  # noqa: B006
    settings: GenerateSettings,
    forward: ForwardSettings,
) -> dict[str, Any]:
    """Answer a prompt with base and carry-on together.

    The answer is streamed to stdout. With --compare the answer of the base alone is shown beside
    it. A mixture answers with its other bases; what each base cost is logged.

    Example:
        carryon generate --carryon run/carryon --prompt "Tom has 3 apples and eats 1. And now?"

    Args:
        carryon: Folder of the carry-on, or its id on the hub.
        prompt: Text to answer.
        base: The base: hub id, folder or .gguf file. Omitted: where it was at extraction.
        alpha: Strength of the correction: 0 is the base, 1 the carry-on as trained. Omitted: the
            alpha in the carry-on's card.
        compare: Show the answer of the base too.
        mix: The other bases of a mixture, in the order of its card. Omitted: where they were at
            extraction.
        mix_device: Device of each of them, or one for all. Omitted: that of the base.
        settings: How text is generated.
        forward: How the base is run.
    """
    from transformers import TextStreamer

    from carryon.train.inference.mixing.modeling import MixedForCausalLM, log_costs
    from carryon.train.inference.modeling import CarryOnForCausalLM

    class VisibleStreamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            super().on_finalized_text(visible(text), stream_end=stream_end)

    model = CarryOnForCausalLM.from_pretrained(
        carryon, base=base, mix=mix, mix_device=mix_device, forward=forward
    )
    if not model.carryons.names and (compare or alpha not in (None, 1.0)):
        raise InputError(
            f"{carryon}: expected neither --compare nor --alpha for a carry-on of the kind native "
            "or top, which is merged into its base. Fix: generate with a bottleneck to compare"
        )
    if not compare:
        streamer = VisibleStreamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True)
        text = model.answer(prompt, settings=settings, alpha=alpha, streamer=streamer)
        if isinstance(model, MixedForCausalLM):
            log_costs(model)
        return {"answer": text}
    [base_text] = model.answer([prompt], settings=settings, carryons=[None])
    text = model.answer(prompt, settings=settings, alpha=alpha)
    title = f"base + carry-on (alpha {model.alpha if alpha is None else alpha:g})"
    if isinstance(model, MixedForCausalLM):
        log_costs(model)
        title = "mixture"
    print(visible(side_by_side(("base", base_text), (title, text))))
    return {"base_answer": base_text, "answer": text}
