"""Stock chat templates, as model cards write them, with what each has to teach.

Templates are tests/cache/corpus/templates/*.jinja: our own minimal versions, equal to the stock
ones in whitespace, start and end tokens, trimming, what they drop and what they raise. In expected
targets `$` stands for the template's end-of-turn token.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TEMPLATES = Path(__file__).parent.parent / "cache" / "corpus" / "templates"


@dataclass(frozen=True)
class Refused:
    """The record is refused, or left out and counted, with a reason that matches `reason`."""

    reason: str


Cell = list[str] | Refused

WEATHER = {"name": "get_weather", "arguments": '{"city": "Oslo"}'}
CALLS = [{"id": "call00001", "type": "function", "function": WEATHER}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather now",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
ANSWER = "It is 7 C."
THOUGHT = "<think>\nhm\n</think>\n\nHello."

CASES: dict[str, dict[str, Any]] = {
    "one": {"messages": [("user", "Hi"), ("assistant", "Hello.")]},
    "two": {
        "messages": [
            *(("user", "Hi"), ("assistant", "Hello.")),
            *(("user", "Bye"), ("assistant", "See you.")),
        ]
    },
    "system": {
        "messages": [
            *(("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello.")),
            *(("user", "Bye"), ("assistant", "See you.")),
        ]
    },
    "tools": {
        "messages": [
            ("user", "Weather?"),
            ("assistant", None, {"tool_calls": CALLS}),
            ("tool", "7.5 C", {"tool_call_id": "call00001", "name": "get_weather"}),
            ("assistant", ANSWER),
        ],
        "tools": TOOLS,
    },
    "thoughtful_tools": {
        "messages": [
            ("user", "Weather?"),
            ("assistant", None, {"tool_calls": CALLS, "reasoning_content": "hm"}),
            ("tool", "7.5 C", {"tool_call_id": "call00001", "name": "get_weather"}),
            ("assistant", ANSWER),
        ],
        "tools": TOOLS,
    },
    "reasoning": {
        "messages": [
            *(("user", "Hi"), ("assistant", "Hello.", {"reasoning_content": "hm"})),
            *(("user", "Bye"), ("assistant", "See you.", {"reasoning_content": "so"})),
        ]
    },
    "think": {
        "messages": [
            *(("user", "Hi"), ("assistant", THOUGHT), ("user", "Bye"), ("assistant", "See you."))
        ]
    },
    "empty": {
        "messages": [
            *(("user", "Hi"), ("assistant", ""), ("user", "Bye"), ("assistant", "See you."))
        ]
    },
    "weights": {
        "messages": [
            *(("user", "Hi"), ("assistant", "Hello.", {"weight": 0})),
            *(("user", "Bye"), ("assistant", "See you.")),
        ]
    },
    "last": {
        "messages": [
            *(("user", "Hi"), ("assistant", "Hello.")),
            *(("user", "Bye"), ("assistant", "See you.")),
        ]
    },
}
"""Records, their messages as (role, content, other fields). `last` is read with turns=last."""

PLAIN: dict[str, list[str]] = {
    "one": ["Hello."],
    "two": ["Hello.", "See you."],
    "system": ["Hello.", "See you."],
    "think": [THOUGHT, "See you."],
    "empty": ["See you."],  # a reply of nothing is not learned
    "weights": ["See you."],
    "last": ["See you."],
}
"""Replies, before a template's frame is put around them."""

NO_TOOLS = Refused(
    r"does not write the tool|messages\[1\].*tool_calls|messages\[2\].*this tool message"
    r"|refuses.*(None|alternate)"
)
NO_REASONING = Refused(r"messages\[1\].*reasoning")
NO_THOUGHTFUL_TOOLS = Refused(f"{NO_TOOLS.reason}|{NO_REASONING.reason}")
NO_THOUGHT = Refused(r"messages\[1\].*(drops|content|reasoning)")
NO_SYSTEM = Refused(r"(messages\[0\].*(drops|content)|System role|must alternate|Only user)")


@dataclass(frozen=True, kw_only=True)
class StockTemplate:
    """One template, the tokens it needs and the targets it makes."""

    name: str
    stop: str
    """The end-of-turn token, as `$`; empty: the template writes none."""
    special: str
    """Special tokens, blank-separated, besides bos, eos and stop."""
    eos: str = ""
    """The tokenizer's; empty: `stop`."""
    bos: str = ""
    ends: str = ""
    """Generation config's end tokens, blank-separated; empty: `stop` and `eos`."""
    added: str = ""
    """Added tokens that are not special, blank-separated."""
    is_rstrip: bool = False
    """Whether special tokens swallow the whitespace behind them, as Phi-3's do."""
    file: str = ""
    """Template's file name without .jinja; empty: `name`."""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    frame: str = "{}$"
    """Reply as a target, where a case below does not say otherwise."""
    cells: Mapping[str, Cell] = field(default_factory=dict)
    """Cases that differ from `frame`."""

    @property
    def text(self) -> str:
        """The Jinja template."""
        return (TEMPLATES / f"{self.file or self.name}.jinja").read_text(encoding="utf-8")

    @property
    def end_tokens(self) -> list[str]:
        """Tokens at which generation stops."""
        return self.ends.split() or sorted({self.stop, self.eos} - {""})

    def expected(self, case: str) -> Cell:
        """Return the targets of a case, `$` replaced, or the refusal."""
        cell: Cell
        if case in self.cells:
            cell = self.cells[case]
        elif case == "tools":
            cell = NO_TOOLS
        elif case in ("reasoning", "thoughtful_tools"):
            cell = NO_REASONING if case == "reasoning" else NO_THOUGHTFUL_TOOLS
        else:
            cell = [self.frame.format(text) for text in PLAIN[case]]
        if isinstance(cell, Refused):
            return cell
        return [text.replace("$", self.stop) for text in cell]


def record_of(case: str) -> dict[str, Any]:
    """Return a case as a record in OpenAI's form."""
    case_fields = CASES[case]
    messages = [
        {"role": role, "content": content, **(more[0] if more else {})}
        for role, content, *more in case_fields["messages"]
    ]
    return {**case_fields, "messages": messages}


IM = "<|im_start|> <|im_end|> <|endoftext|>"
THINK = "<think> </think> <tool_call> </tool_call> <tool_response> </tool_response>"
HEADERS = "<|start_header_id|> <|end_header_id|> <|eot_id|> <|python_tag|>"
DEEPSEEK = " ".join(
    f"<\uff5c{name}\uff5c>"
    for name in (
        *("User", "Assistant", "tool\u2581calls\u2581begin", "tool\u2581calls\u2581end"),
        *("tool\u2581call\u2581begin", "tool\u2581call\u2581end", "tool\u2581sep"),
        *("tool\u2581outputs\u2581begin", "tool\u2581outputs\u2581end"),
        *("tool\u2581output\u2581begin", "tool\u2581output\u2581end"),
    )
)
DEEPSEEK_BOS = "<\uff5cbegin\u2581of\u2581sentence\uff5c>"
DEEPSEEK_EOS = "<\uff5cend\u2581of\u2581sentence\uff5c>"
DEEPSEEK_CALL = (
    "<\uff5ctool\u2581calls\u2581begin\uff5c><\uff5ctool\u2581call\u2581begin\uff5c>function"
    '<\uff5ctool\u2581sep\uff5c>get_weather\n```json\n{"city": "Oslo"}\n```'
    "<\uff5ctool\u2581call\u2581end\uff5c><\uff5ctool\u2581calls\u2581end\uff5c>$"
)
QWEN_CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>$'
LLAMA_CALL = '{"name": "get_weather", "parameters": {"city": "Oslo"}}'
FUNCTIONS = '[{"name": "get_weather", "arguments": {"city": "Oslo"}}]'
MISTRAL_CALL = '[{"name": "get_weather", "arguments": {"city": "Oslo"}, "id": "call00001"}]$'
GPT_OSS_CALL = (
    ' to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Oslo"}<|call|>'
)
NO_THINKING = "<think>\n\n</think>\n\n"

STOCK = [
    # ChatML
    StockTemplate(name="smollm2", stop="<|im_end|>", bos="<|im_start|>", special=IM),
    StockTemplate(
        name="qwen2_5",
        stop="<|im_end|>",
        special=IM,
        added=THINK,
        ends="<|im_end|> <|endoftext|>",
        cells={"tools": [QWEN_CALL, f"{ANSWER}$"]},
    ),
    StockTemplate(
        name="qwen3",
        stop="<|im_end|>",
        special=IM,
        added=THINK,
        ends="<|im_end|> <|endoftext|>",
        frame=NO_THINKING + "{}$",
        cells={
            "tools": [NO_THINKING + QWEN_CALL, f"{NO_THINKING}{ANSWER}$"],
            "thoughtful_tools": [
                f"<think>\nhm\n</think>\n\n{QWEN_CALL}",
                f"{NO_THINKING}{ANSWER}$",
            ],
            "think": [f"{THOUGHT}$", f"{NO_THINKING}See you.$"],
            "reasoning": [f"{THOUGHT}$", "<think>\nso\n</think>\n\nSee you.$"],
        },
    ),
    StockTemplate(
        name="qwen3_no_think",
        file="qwen3",
        kwargs={"enable_thinking": False},
        stop="<|im_end|>",
        special=IM,
        added=THINK,
        ends="<|im_end|> <|endoftext|>",
        cells={
            "tools": [QWEN_CALL, f"{ANSWER}$"],
            "thoughtful_tools": [f"hm\n</think>\n\n{QWEN_CALL}", f"{ANSWER}$"],
            # the prompt has <think>\n\n</think>\n\n; what follows <think>\n differs
            "think": ["hm\n</think>\n\nHello.$", "See you.$"],
            "reasoning": ["hm\n</think>\n\nHello.$", "so\n</think>\n\nSee you.$"],
        },
    ),
    StockTemplate(
        name="qwen3_2507",
        stop="<|im_end|>",
        special=IM,
        added=THINK,
        ends="<|im_end|> <|endoftext|>",
        cells={"tools": [QWEN_CALL, f"{ANSWER}$"]},
    ),
    StockTemplate(
        name="qwq",  # the prompt ends with <think>\n, which answers without thoughts do not have
        stop="<|im_end|>",
        special=IM,
        added=THINK,
        ends="<|im_end|> <|endoftext|>",
        cells={
            "tools": [QWEN_CALL, f"{ANSWER}$"],
            "think": ["hm\n</think>\n\nHello.$", "See you.$"],
        },
    ),
    StockTemplate(name="yi1_5", stop="<|im_end|>", eos="<|im_end|>", special=IM),
    StockTemplate(name="internlm2", stop="<|im_end|>", bos="<s>", eos="</s>", special=IM),
    StockTemplate(
        name="hermes",
        stop="<|im_end|>",
        bos="<|begin_of_text|>",
        special=IM,
        cells={
            "tools": [
                '<tool_call>\n{"arguments": {"city": "Oslo"}, "name": "get_weather"}\n'
                "</tool_call>$",
                f"{ANSWER}$",
            ]
        },
    ),
    StockTemplate(
        name="phi4",
        stop="<|im_end|>",
        bos="<|endoftext|>",
        eos="<|endoftext|>",
        special="<|im_start|> <|im_sep|>",
    ),
    StockTemplate(
        name="kimi_k2",  # writes ids of calls in place of names
        stop="<|im_end|>",
        bos="[BOS]",
        eos="[EOS]",
        special="<|im_system|> <|im_user|> <|im_assistant|> <|im_middle|> "
        "<|tool_calls_section_begin|> <|tool_calls_section_end|> <|tool_call_begin|> "
        "<|tool_call_argument_begin|> <|tool_call_end|>",
    ),
    # Llama
    StockTemplate(name="llama2", stop="</s>", bos="<s>", special="<unk>", frame=" {} $"),
    StockTemplate(
        name="llama3",
        stop="<|eot_id|>",
        bos="<|begin_of_text|>",
        eos="<|end_of_text|>",
        special=HEADERS,
    ),
    StockTemplate(
        name="llama3_1",
        stop="<|eot_id|>",
        bos="<|begin_of_text|>",
        ends="<|end_of_text|> <|eom_id|> <|eot_id|>",
        special=HEADERS,
        cells={"tools": [f"{LLAMA_CALL}$", f"{ANSWER}$"]},
    ),
    StockTemplate(
        name="llama3_2",
        stop="<|eot_id|>",
        bos="<|begin_of_text|>",
        ends="<|end_of_text|> <|eom_id|> <|eot_id|>",
        special=HEADERS,
        cells={"tools": [f"{LLAMA_CALL}$", f"{ANSWER}$"]},
    ),
    StockTemplate(
        name="llama4",
        stop="<|eot|>",
        bos="<|begin_of_text|>",
        ends="<|end_of_text|> <|eom|> <|eot|>",
        special="<|header_start|> <|header_end|> <|python_start|> <|python_end|>",
        cells={"tools": [f"<|python_start|>{LLAMA_CALL}<|python_end|>$", f"{ANSWER}$"]},
    ),
    StockTemplate(
        name="nemotron",
        stop="<|eot_id|>",
        bos="<|begin_of_text|>",
        special=HEADERS,
        cells={
            "tools": [f"<TOOLCALL>{FUNCTIONS}</TOOLCALL>$", f"{ANSWER}$"],
            "think": [f"{THOUGHT}$", "See you.$"],
        },
    ),
    # Mistral
    StockTemplate(
        name="mistral_v0_1", stop="</s>", bos="<s>", special="<unk>", cells={"system": NO_SYSTEM}
    ),
    StockTemplate(
        name="mistral_v0_3",
        stop="</s>",
        bos="<s>",
        special="[INST] [/INST] [TOOL_CALLS] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] "
        "[TOOL_RESULTS] [/TOOL_RESULTS]",
        frame=" {}$",
        cells={
            "tools": [f"[TOOL_CALLS] {MISTRAL_CALL}", f" {ANSWER}$"],
        },
    ),
    StockTemplate(
        name="mistral_nemo",
        stop="</s>",
        bos="<s>",
        special="[INST] [/INST] [TOOL_CALLS] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] "
        "[TOOL_RESULTS] [/TOOL_RESULTS]",
        cells={"tools": [f"[TOOL_CALLS]{MISTRAL_CALL}", f"{ANSWER}$"]},
    ),
    StockTemplate(
        name="mistral_small_3",
        stop="</s>",
        bos="<s>",
        special="[INST] [/INST] [SYSTEM_PROMPT] [/SYSTEM_PROMPT]",
    ),
    StockTemplate(name="mixtral", stop="</s>", bos="<s>", special="<unk>", frame=" {}$"),
    # Gemma, Phi
    StockTemplate(
        name="gemma2",
        stop="<end_of_turn>",
        bos="<bos>",
        eos="<eos>",
        special="<start_of_turn>",
        cells={"system": NO_SYSTEM},
    ),
    StockTemplate(
        name="gemma3", stop="<end_of_turn>", bos="<bos>", eos="<eos>", special="<start_of_turn>"
    ),
    StockTemplate(
        name="phi3",
        stop="<|end|>",
        bos="<s>",
        eos="<|endoftext|>",
        ends="<|endoftext|> <|assistant|> <|end|>",
        special="<|system|> <|user|> <|assistant|>",
        is_rstrip=True,
    ),
    StockTemplate(
        name="phi3_medium",
        stop="<|end|>",
        bos="<s>",
        eos="<|endoftext|>",
        special="<|system|> <|user|> <|assistant|>",
        is_rstrip=True,
        cells={"system": NO_SYSTEM},
    ),
    StockTemplate(
        name="phi3_5",
        stop="<|end|>",
        bos="<s>",
        eos="<|endoftext|>",
        ends="<|endoftext|> <|assistant|> <|end|>",
        special="<|system|> <|user|> <|assistant|>",
        is_rstrip=True,
    ),
    StockTemplate(
        name="phi4_mini",
        stop="<|end|>",
        bos="<|endoftext|>",
        eos="<|endoftext|>",
        special="<|system|> <|user|> <|assistant|> <|tool|> <|/tool|>",
    ),
    # DeepSeek
    StockTemplate(
        name="deepseek_v2", stop=DEEPSEEK_EOS, bos=DEEPSEEK_BOS, special="", frame=" {}$"
    ),
    StockTemplate(
        name="deepseek_v3",
        stop=DEEPSEEK_EOS,
        bos=DEEPSEEK_BOS,
        special=DEEPSEEK,
        cells={"tools": [DEEPSEEK_CALL, f"{ANSWER}$"]},
    ),
    StockTemplate(
        name="deepseek_r1",
        stop=DEEPSEEK_EOS,
        bos=DEEPSEEK_BOS,
        special=DEEPSEEK,
        added="<think> </think>",
        cells={
            "tools": [DEEPSEEK_CALL, f"{ANSWER}$"],
            "think": ["hm\n</think>\n\nHello.$", "See you.$"],
        },
    ),
    StockTemplate(
        name="deepseek_v3_1",
        stop=DEEPSEEK_EOS,
        bos=DEEPSEEK_BOS,
        special=DEEPSEEK,
        added="<think> </think>",
        cells={
            "tools": [
                "<\uff5ctool\u2581calls\u2581begin\uff5c><\uff5ctool\u2581call\u2581begin\uff5c>"
                'get_weather<\uff5ctool\u2581sep\uff5c>{"city": "Oslo"}'
                "<\uff5ctool\u2581call\u2581end\uff5c><\uff5ctool\u2581calls\u2581end\uff5c>$",
                f"{ANSWER}$",
            ],
            "think": NO_THOUGHT,
        },
    ),
    StockTemplate(
        name="deepseek_v3_1_thinking",  # the prompt ends with <think>, answers begin with </think>
        file="deepseek_v3_1",
        kwargs={"thinking": True},
        stop=DEEPSEEK_EOS,
        bos=DEEPSEEK_BOS,
        special=DEEPSEEK,
        added="<think> </think>",
        frame="</think>{}$",
        cells={
            "tools": [
                "</think><\uff5ctool\u2581calls\u2581begin\uff5c>"
                "<\uff5ctool\u2581call\u2581begin\uff5c>get_weather<\uff5ctool\u2581sep\uff5c>"
                '{"city": "Oslo"}<\uff5ctool\u2581call\u2581end\uff5c>'
                "<\uff5ctool\u2581calls\u2581end\uff5c>$",
                f"{ANSWER}$",
            ],
            "think": ["\nhm\n</think>\n\nHello.$", "</think>See you.$"],
        },
    ),
    # others
    StockTemplate(
        name="gpt_oss",
        stop="<|return|>",
        bos="<|startoftext|>",
        ends="<|return|> <|endoftext|> <|call|>",
        special="<|start|> <|end|> <|message|> <|channel|> <|constrain|>",
        frame="<|channel|>final<|message|>{}$",
        cells={
            "tools": [GPT_OSS_CALL, f"<|channel|>final<|message|>{ANSWER}$"],
            # the prompt of the answer has the thought, which the finished answer drops
            "thoughtful_tools": [
                f"<|channel|>analysis<|message|>hm<|end|><|start|>assistant{GPT_OSS_CALL}",
                f"<|channel|>final<|message|>{ANSWER}$",
            ],
            "reasoning": [
                "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
                "<|channel|>final<|message|>Hello.$",
                "<|channel|>analysis<|message|>so<|end|><|start|>assistant"
                "<|channel|>final<|message|>See you.$",
            ],
        },
    ),
    StockTemplate(
        name="command_r",
        stop="<|END_OF_TURN_TOKEN|>",
        bos="<BOS_TOKEN>",
        special="<|START_OF_TURN_TOKEN|> <|SYSTEM_TOKEN|> <|USER_TOKEN|> <|CHATBOT_TOKEN|>",
    ),
    StockTemplate(
        name="glm4",  # a turn ends where the next one begins
        stop="<|user|>",
        eos="<|endoftext|>",
        ends="<|endoftext|> <|user|> <|observation|>",
        special="[gMASK] <sop> <|system|> <|assistant|>",
        frame="\n{}$",
        cells={"tools": ['get_weather\n{"city": "Oslo"}<|observation|>', f"\n{ANSWER}$"]},
    ),
    StockTemplate(name="falcon", stop="", eos="<|endoftext|>", special="", frame=" {}"),
    StockTemplate(
        name="falcon3",
        stop="<|endoftext|>",
        special="<|system|> <|user|> <|assistant|>",
    ),
    StockTemplate(name="zephyr", stop="</s>", bos="<s>", special=""),
    StockTemplate(name="vicuna", stop="</s>", bos="<s>", special="", frame=" {}$"),
    StockTemplate(name="openchat", stop="<|end_of_turn|>", bos="<s>", special="", frame=" {}$"),
    StockTemplate(
        name="stablelm2",
        stop="<|endoftext|>",
        bos="<|endoftext|>",
        special="<|system|> <|user|> <|assistant|>",
    ),
    StockTemplate(
        name="granite3",
        stop="<|end_of_text|>",
        bos="<|end_of_text|>",
        special="<|start_of_role|> <|end_of_role|> <|tool_call|>",
        cells={"tools": [f"<|tool_call|>{FUNCTIONS}$", f"{ANSWER}$"]},
    ),
    StockTemplate(name="olmo2", stop="<|endoftext|>", bos="<|endoftext|>", special=""),
    StockTemplate(
        name="exaone3_5",
        stop="[|endofturn|]",
        bos="[BOS]",
        special="[|system|] [|user|] [|assistant|]",
    ),
    StockTemplate(name="minicpm", stop="", bos="<s>", eos="</s>", special="", frame="{}"),
    # of no family: what templates may do
    StockTemplate(name="generation_marks", stop="<|im_end|>", special=IM),
    StockTemplate(name="marks_without_end", stop="<|im_end|>", special=IM),
    StockTemplate(name="eos_once", stop="</s>", special="", frame="{}\n\n$"),
    StockTemplate(name="no_end", stop="", eos="</s>", special="", frame="{}\n\n"),
    StockTemplate(name="drops_system", stop="<|im_end|>", special=IM, cells={"system": NO_SYSTEM}),
    StockTemplate(name="drops_tool_calls", stop="<|im_end|>", special=IM),
    StockTemplate(
        name="reasoning_chatml",
        stop="<|im_end|>",
        special=IM,
        cells={
            "reasoning": ["<think>hm</think>Hello.$", "<think>so</think>See you.$"],
        },
    ),
]
