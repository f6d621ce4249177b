"""What every chat template makes of two conversations, typed by hand: ⟦...⟧ is trained, all else is masked.

PLAIN and TOOLS are the conversations. `TEXT[name]` is the drawing of PLAIN, `TOOL_TEXT[name]` that of TOOLS where a
family has a form for tools. `IDS` and `MASKS` are those of PLAIN on `data_tokenizers.byte_level(trim_offsets=False)`.
"""

from __future__ import annotations

from typing import Any

PLAIN: list[dict[str, Any]] = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi there"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "It is 2.", "reasoning_content": "Add."},
]
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "sky",
        "description": "Look up.",
        "parameters": {
            "type": "object",
            "properties": {"at": {"type": "string", "description": "City"}},
            "required": ["at"],
        },
    },
}
TOOLS: list[dict[str, Any]] = [
    {"role": "user", "content": "Sun?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "call12345", "type": "function", "function": {"name": "sky", "arguments": {"at": "Rome"}}}
        ],
    },
    {"role": "tool", "content": "blue", "tool_call_id": "call12345"},
    {"role": "assistant", "content": "Yes."},
]

_CHATML = (
    "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n⟦Hello.<|im_end|>⟧\n"
    "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
)
_SYSTEM = "<|im_start|>system\nBe kind.<|im_end|>\n"
_HEAD3 = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
_LLAMA3 = (
    "Be kind.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi there<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Hello.<|eot_id|>⟧"
    "<|start_header_id|>user<|end_header_id|>\n\n1+1?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n⟦It is 2.<|eot_id|>⟧"
)
_DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
_HARMONY = (
    "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\n"
    "Current date: 2025-08-05\n\nReasoning: medium\n\n"
    "# Valid channels: analysis, commentary, final. Channel must be included for every message."
)

TEXT: dict[str, str] = {
    "chatml": _SYSTEM + _CHATML + "⟦It is 2.<|im_end|>⟧\n",
    "qwen2": _SYSTEM + _CHATML + "⟦It is 2.<|im_end|>⟧\n",
    "qwen2.5": _SYSTEM + _CHATML + "⟦It is 2.<|im_end|>⟧\n",
    "minicpm4": _SYSTEM + _CHATML + "⟦It is 2.<|im_end|>⟧\n",
    "qwen3": _SYSTEM + _CHATML + "⟦<think>\nAdd.\n</think>\n\nIt is 2.<|im_end|>⟧\n",
    "qwen3-no-think": _SYSTEM + _CHATML + "<think>\n\n</think>\n\n⟦It is 2.<|im_end|>⟧\n",
    "llama3": _HEAD3 + _LLAMA3,
    "llama3.1": _HEAD3 + _DATES + _LLAMA3,
    "llama2": (
        "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi there [/INST]⟦ Hello. </s>⟧<s>[INST] 1+1? [/INST]⟦ It is 2. </s>⟧"
    ),
    "mistral-v1": "<s> [INST] Be kind.\n\nHi there [/INST]⟦ Hello.</s>⟧ [INST] 1+1? [/INST]⟦ It is 2.</s>⟧",
    "mistral": "<s>[INST] Hi there[/INST]⟦ Hello.</s>⟧[INST] Be kind.\n\n1+1?[/INST]⟦ It is 2.</s>⟧",
    "mistral-tekken": "<s>[INST]Hi there[/INST]⟦Hello.</s>⟧[INST]Be kind.\n\n1+1?[/INST]⟦It is 2.</s>⟧",
    "mistral-v7": (
        "<s>[SYSTEM_PROMPT]Be kind.[/SYSTEM_PROMPT][INST]Hi there[/INST]⟦Hello.</s>⟧[INST]1+1?[/INST]⟦It is 2.</s>⟧"
    ),
    "gemma": (
        "<bos><start_of_turn>user\nBe kind.\n\nHi there<end_of_turn>\n<start_of_turn>model\n⟦Hello.<end_of_turn>⟧\n"
        "<start_of_turn>user\n1+1?<end_of_turn>\n<start_of_turn>model\n⟦It is 2.<end_of_turn>⟧\n"
    ),
    "phi3": (
        "<|system|>\nBe kind.<|end|>\n<|user|>\nHi there<|end|>\n<|assistant|>\n⟦Hello.<|end|>⟧\n"
        "<|user|>\n1+1?<|end|>\n<|assistant|>\n⟦It is 2.<|end|>⟧\n"
    ),
    "phi4": (
        "<|im_start|>system<|im_sep|>Be kind.<|im_end|><|im_start|>user<|im_sep|>Hi there<|im_end|>"
        "<|im_start|>assistant<|im_sep|>⟦Hello.<|im_end|>⟧<|im_start|>user<|im_sep|>1+1?<|im_end|>"
        "<|im_start|>assistant<|im_sep|>⟦It is 2.<|im_end|>⟧"
    ),
    "phi4-mini": (
        "<|system|>Be kind.<|end|><|user|>Hi there<|end|><|assistant|>⟦Hello.<|end|>⟧"
        "<|user|>1+1?<|end|><|assistant|>⟦It is 2.<|end|>⟧"
    ),
    "deepseek": (
        "<｜begin▁of▁sentence｜>Be kind.<｜User｜>Hi there<｜Assistant｜>⟦Hello.<｜end▁of▁sentence｜>⟧"
        "<｜User｜>1+1?<｜Assistant｜>⟦It is 2.<｜end▁of▁sentence｜>⟧"
    ),
    "deepseek-r1": (
        "<｜begin▁of▁sentence｜>Be kind.<｜User｜>Hi there<｜Assistant｜>⟦Hello.<｜end▁of▁sentence｜>⟧"
        "<｜User｜>1+1?<｜Assistant｜><think>\n⟦Add.\n</think>\n\nIt is 2.<｜end▁of▁sentence｜>⟧"
    ),
    "deepseek-v3.1": (
        "<｜begin▁of▁sentence｜>Be kind.<｜User｜>Hi there<｜Assistant｜></think>⟦Hello.<｜end▁of▁sentence｜>⟧"
        "<｜User｜>1+1?<｜Assistant｜><think>⟦Add.</think>It is 2.<｜end▁of▁sentence｜>⟧"
    ),
    "gpt-oss": (
        _HARMONY + "<|end|><|start|>developer<|message|># Instructions\n\nBe kind.\n\n<|end|>"
        "<|start|>user<|message|>Hi there<|end|><|start|>assistant⟦<|channel|>final<|message|>Hello.<|end|>⟧"
        "<|start|>user<|message|>1+1?<|end|><|start|>assistant⟦<|channel|>analysis<|message|>Add.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>It is 2.<|return|>⟧"
    ),
}

_TOOL_JSON = (
    '{"type": "function", "function": {"name": "sky", "description": "Look up.", "parameters": {"type": "object",'
    ' "properties": {"at": {"type": "string", "description": "City"}}, "required": ["at"]}}}'
)
_TOOL_BLOCK = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function"
    " signatures within <tools></tools> XML tags:\n<tools>\n" + _TOOL_JSON + "\n</tools>\n\nFor each function call,"
    " return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
    "<|im_start|>user\nSun?<|im_end|>\n<|im_start|>assistant\n"
    '⟦<tool_call>\n{"name": "sky", "arguments": {"at": "Rome"}}\n</tool_call><|im_end|>⟧\n'
    "<|im_start|>user\n<tool_response>\nblue\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
)
_LLAMA3_TOOLS = (
    "<|start_header_id|>user<|end_header_id|>\n\nGiven the following functions, please respond with a JSON for a"
    " function call with its proper arguments that best answers the given prompt.\n\nRespond in the format"
    ' {"name": function name, "parameters": dictionary of argument name and its value}.Do not use variables.\n\n'
    '{\n    "type": "function",\n    "function": {\n        "name": "sky",\n        "description": "Look up.",\n'
    '        "parameters": {\n            "type": "object",\n            "properties": {\n                "at": {\n'
    '                    "type": "string",\n                    "description": "City"\n                }\n'
    '            },\n            "required": [\n                "at"\n            ]\n        }\n    }\n}\n\n'
    "Sun?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    '⟦{"name": "sky", "parameters": {"at": "Rome"}}<|eot_id|>⟧<|start_header_id|>ipython<|end_header_id|>\n\n'
    '"blue"<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n⟦Yes.<|eot_id|>⟧'
)
_DEEPSEEK_TOOLS = (
    "<｜begin▁of▁sentence｜><｜User｜>Sun?<｜Assistant｜>⟦<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>sky\n"
    '```json\n{"at": "Rome"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>⟧'
    "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>blue<｜tool▁output▁end｜><｜tool▁outputs▁end｜>"
    "⟦Yes.<｜end▁of▁sentence｜>⟧"
)

TOOL_TEXT: dict[str, str] = {
    "chatml": "<|im_start|>system\n" + _TOOL_BLOCK + "⟦Yes.<|im_end|>⟧\n",
    "qwen2": "<|im_start|>system\nYou are a helpful assistant.\n\n" + _TOOL_BLOCK + "⟦Yes.<|im_end|>⟧\n",
    "qwen2.5": (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.\n\n"
        + _TOOL_BLOCK
        + "⟦Yes.<|im_end|>⟧\n"
    ),
    "qwen3": "<|im_start|>system\n" + _TOOL_BLOCK + "<think>\n\n</think>\n\n⟦Yes.<|im_end|>⟧\n",
    "qwen3-no-think": "<|im_start|>system\n" + _TOOL_BLOCK + "<think>\n\n</think>\n\n⟦Yes.<|im_end|>⟧\n",
    "llama3": "<|begin_of_text|>" + _LLAMA3_TOOLS,
    "llama3.1": _HEAD3 + "Environment: ipython\n" + _DATES + "<|eot_id|>" + _LLAMA3_TOOLS,
    "mistral": (
        f"<s>[AVAILABLE_TOOLS] [{_TOOL_JSON}][/AVAILABLE_TOOLS][INST] Sun?[/INST]"
        '⟦[TOOL_CALLS] [{"name": "sky", "arguments": {"at": "Rome"}, "id": "call12345"}]</s>⟧'
        '[TOOL_RESULTS] {"content": blue, "call_id": "call12345"}[/TOOL_RESULTS]⟦ Yes.</s>⟧'
    ),
    "mistral-tekken": (
        f"<s>[AVAILABLE_TOOLS][{_TOOL_JSON}][/AVAILABLE_TOOLS][INST]Sun?[/INST]"
        '⟦[TOOL_CALLS][{"name": "sky", "arguments": {"at": "Rome"}, "id": "call12345"}]</s>⟧'
        '[TOOL_RESULTS]{"content": blue, "call_id": "call12345"}[/TOOL_RESULTS]⟦Yes.</s>⟧'
    ),
    "mistral-v7": (
        f"<s>[AVAILABLE_TOOLS] [{_TOOL_JSON}][/AVAILABLE_TOOLS][INST]Sun?[/INST]"
        '⟦[TOOL_CALLS] [{"name": "sky", "arguments": {"at": "Rome"}, "id": "call12345"}]</s>⟧'
        '[TOOL_RESULTS] {"content": blue, "call_id": "call12345"}[/TOOL_RESULTS]⟦Yes.</s>⟧'
    ),
    "phi4-mini": (
        '<|system|><|tool|>{"name": "sky", "description": "Look up.", "parameters": {"type": "object", "properties":'
        ' {"at": {"type": "string", "description": "City"}}, "required": ["at"]}}<|/tool|>You are a helpful assistant'
        " with some tools.\nTo use a tool, respond in this format: <|tool_call|>"
        '{"name": "foo", "arguments": {"a": 1}}<|/tool_call|><|end|><|user|>Sun?<|end|><|assistant|>'
        '⟦<|tool_call|>{"name": "sky", "arguments": {"at": "Rome"}}<|/tool_call|><|end|>⟧'
        '<|tool_response|>"blue"<|end|><|assistant|>⟦Yes.<|end|>⟧'
    ),
    "deepseek": _DEEPSEEK_TOOLS,
    "deepseek-r1": _DEEPSEEK_TOOLS,
    "deepseek-v3.1": (
        "<｜begin▁of▁sentence｜><｜User｜>Sun?<｜Assistant｜></think>⟦<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>sky<｜tool▁sep｜>"
        '{"at": "Rome"}<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>⟧'
        "<｜tool▁output▁begin｜>blue<｜tool▁output▁end｜>⟦Yes.<｜end▁of▁sentence｜>⟧"
    ),
    "gpt-oss": (
        _HARMONY + "\nCalls to these tools must go to the commentary channel: 'functions'.<|end|>"
        "<|start|>developer<|message|># Tools\n\n## functions\n\nnamespace functions {\n\n// Look up.\n"
        "type sky = (_: {\n// City\nat: string,\n}) => any;\n\n} // namespace functions<|end|>"
        "<|start|>user<|message|>Sun?<|end|><|start|>assistant⟦ to=functions.sky<|channel|>commentary json<|message|>"
        '{"at": "Rome"}<|call|>⟧<|start|>functions.sky to=assistant<|channel|>commentary<|message|>"blue"<|end|>'
        "<|start|>assistant⟦<|channel|>final<|message|>Yes.<|return|>⟧"
    ),
}


IDS: dict[str, str] = {
    "chatml": (
        "19 391 389 368 249 356 409 118 64 17 249 19 396 249 357 420 17 249 19 115 333 334 249 90 119 126 376 "
        "64 17 249 19 396 249 67 61 67 81 17 249 19 115 333 334 249 326 313 336 64 17 249"
    ),
    "qwen2": (
        "19 391 389 368 249 356 409 118 64 17 249 19 396 249 357 420 17 249 19 115 333 334 249 90 119 126 376 "
        "64 17 249 19 396 249 67 61 67 81 17 249 19 115 333 334 249 326 313 336 64 17 249"
    ),
    "qwen2.5": (
        "19 391 389 368 249 356 409 118 64 17 249 19 396 249 357 420 17 249 19 115 333 334 249 90 119 126 376 "
        "64 17 249 19 396 249 67 61 67 81 17 249 19 115 333 334 249 326 313 336 64 17 249"
    ),
    "qwen3": (
        "19 391 389 368 249 356 409 118 64 17 249 19 396 249 357 420 17 249 19 115 333 334 249 90 119 126 376 "
        "64 17 249 19 396 249 67 61 67 81 17 249 19 115 333 334 249 78 134 122 311 125 80 249 355 64 249 78 "
        "65 134 122 311 125 80 249 249 326 313 336 64 17 249"
    ),
    "qwen3-no-think": (
        "19 391 389 368 249 356 409 118 64 17 249 19 396 249 357 420 17 249 19 115 333 334 249 90 119 126 376 "
        "64 17 249 19 396 249 67 61 67 81 17 249 19 115 333 334 249 78 134 122 311 125 80 249 249 78 65 134 "
        "122 311 125 80 249 249 326 313 336 64 17 249"
    ),
    "llama3": (
        "9 22 391 389 368 12 249 249 356 409 118 64 16 22 396 12 249 249 357 420 16 22 115 333 334 12 249 249 "
        "90 119 126 376 64 16 22 396 12 249 249 67 61 67 81 16 22 115 333 334 12 249 249 326 313 336 64 16"
    ),
    "llama3.1": (
        "9 22 391 389 368 12 249 249 85 135 134 134 311 121 271 93 128 129 137 126 119 118 121 119 271 86 329 "
        "119 76 271 86 119 117 368 364 336 66 68 69 249 102 129 367 271 86 329 119 76 336 72 271 92 135 126 "
        "336 66 68 70 249 249 356 409 118 64 16 22 396 12 249 249 357 420 16 22 115 333 334 12 249 249 90 119 "
        "126 376 64 16 22 396 12 249 249 67 61 67 81 16 22 115 333 334 12 249 249 326 313 336 64 16"
    ),
    "llama2": (
        "4 47 271 78 78 101 107 101 80 80 249 356 409 118 64 249 78 78 65 101 107 101 80 80 249 249 357 420 "
        "271 43 271 90 119 126 376 64 271 0 4 47 271 67 61 67 81 271 43 343 313 336 64 271 0"
    ),
    "mistral-v1": (
        "4 271 47 271 356 409 118 64 249 249 357 420 271 43 271 90 119 126 376 64 0 271 47 271 67 61 67 81 "
        "271 43 343 313 336 64 0"
    ),
    "mistral": (
        "4 47 404 420 43 271 90 119 126 376 64 0 47 271 356 409 118 64 249 249 67 61 67 81 43 343 313 336 64 0"
    ),
    "mistral-tekken": "4 47 357 420 43 90 119 126 376 64 0 47 356 409 118 64 249 249 67 61 67 81 43 326 313 336 64 0",
    "mistral-v7": "4 48 356 409 118 64 44 47 357 420 43 90 119 126 376 64 0 47 67 61 67 81 43 326 313 336 64 0",
    "gemma": (
        "1 5 396 249 356 409 118 64 249 249 357 420 2 249 5 127 384 126 249 90 119 126 376 64 2 249 5 396 249 "
        "67 61 67 81 2 249 5 127 384 126 249 326 313 336 64 2 249"
    ),
    "phi3": (
        "24 249 356 409 118 64 14 249 28 249 357 420 14 249 8 249 90 119 126 376 64 14 249 28 249 67 61 67 81 "
        "14 249 8 249 326 313 336 64 14 249"
    ),
    "phi4": (
        "19 391 389 368 18 356 409 118 64 17 19 396 18 357 420 17 19 115 333 334 18 90 119 126 376 64 17 19 "
        "396 18 67 61 67 81 17 19 115 333 334 18 326 313 336 64 17"
    ),
    "phi4-mini": "24 356 409 118 64 14 28 357 420 14 8 90 119 126 376 64 14 28 67 61 67 81 14 8 326 313 336 64 14",
    "deepseek": "31 356 409 118 64 30 357 420 29 90 119 126 376 64 32 30 67 61 67 81 29 326 313 336 64 32",
    "deepseek-r1": (
        "31 356 409 118 64 30 357 420 29 90 119 126 376 64 32 30 67 61 67 81 29 78 134 122 311 125 80 249 355 "
        "64 249 78 65 134 122 311 125 80 249 249 326 313 336 64 32"
    ),
    "deepseek-v3.1": (
        "31 356 409 118 64 30 357 420 29 78 65 134 122 311 125 80 90 119 126 376 64 32 30 67 61 67 81 29 78 "
        "134 122 311 125 80 355 64 78 65 134 122 311 125 80 326 313 336 64 32"
    ),
    "gpt-oss": (
        "23 391 389 368 20 360 135 416 271 85 122 329 89 98 102 62 309 271 126 315 121 119 271 126 115 128 "
        "121 135 115 121 119 425 126 308 132 362 119 118 271 116 139 271 97 130 119 128 83 91 64 249 93 128 "
        "129 137 126 119 118 121 119 271 117 135 134 129 120 120 76 336 66 68 70 63 66 72 249 85 135 132 319 "
        "318 271 118 329 119 76 336 66 68 71 63 66 74 63 66 71 249 249 100 119 115 133 312 311 121 76 338 119 "
        "118 123 135 127 249 249 53 271 104 328 123 118 271 117 122 115 380 119 126 133 76 346 421 62 407 378 "
        "369 419 62 408 328 64 271 85 122 115 380 119 126 338 135 389 271 116 119 341 117 126 135 317 118 271 "
        "120 129 132 271 119 136 331 139 338 119 133 133 115 121 119 64 14 23 317 136 119 376 130 331 20 53 "
        "271 91 128 389 132 135 366 374 133 249 249 356 409 118 64 399 14 23 396 20 357 420 14 23 115 333 334 "
        "11 371 328 20 90 119 126 376 64 14 23 396 20 67 61 67 81 14 23 115 333 334 11 115 128 421 20 355 64 "
        "14 23 115 333 334 11 371 328 20 326 313 336 64 21"
    ),
    "minicpm4": (
        "19 391 389 368 249 356 409 118 64 17 249 19 396 249 357 420 17 249 19 115 333 334 249 90 119 126 376 "
        "64 17 249 19 396 249 67 61 67 81 17 249 19 115 333 334 249 326 313 336 64 17 249"
    ),
}

MASKS: dict[str, str] = {
    "chatml": "00000000000000000000000111111000000000000000111110",
    "qwen2": "00000000000000000000000111111000000000000000111110",
    "qwen2.5": "00000000000000000000000111111000000000000000111110",
    "qwen3": "000000000000000000000001111110000000000000001111111111111111111111110",
    "qwen3-no-think": "0000000000000000000000011111100000000000000000000000000000000111110",
    "llama3": "00000000000000000000000000001111110000000000000000011111",
    "llama3.1": (
        "000000000000000000000000000000000000000000000000000000000000000000000000000000001111110000000000000000011111"
    ),
    "llama2": "00000000000000000000000000000011111111000000000111111",
    "mistral-v1": "00000000000000111111100000000011111",
    "mistral": "000001111111000000000000011111",
    "mistral-tekken": "0000011111100000000000011111",
    "mistral-v7": "0000000000011111100000011111",
    "gemma": "0000000000000000000111111000000000000000111110",
    "phi3": "000000000000000011111100000000000111110",
    "phi4": "000000000000000000000111111000000000000011111",
    "phi4-mini": "00000000000111111000000011111",
    "deepseek": "00000000011111100000011111",
    "deepseek-r1": "000000000111111000000000000011111111111111111",
    "deepseek-v3.1": "000000000000000011111100000000000011111111111111",
    "gpt-oss": (
        "0000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000"
        "0000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000"
        "0000000000001111111111000000000000111111111111111111111"
    ),
    "minicpm4": "00000000000000000000000111111000000000000000111110",
}
