"""Writes chat.json: conversations with parts, tools, calls and messages to continue, as transformers renders them by templates written
for this, or that it refuses them. Run with transformers 5.24: python tests/goldens/chat.py"""

import json
import pathlib

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
TURNS = "{% for m in messages %}<{{ m.role }}>\n"
END = "</{{ m['role'] }}>\n{% endfor %}{% if add_generation_prompt %}<assistant>\n{% endif %}"
TEMPLATES = {
    "texts": TURNS + "{{ m.content }}" + END,
    "joined": "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '</>' }}{% endfor %}",
    "trimmed": TURNS + "{{ m.content | trim }}{{ eos_token }}" + END,
    "last alone": "{{ bos_token }}{{ messages[0].content }}",
    "parts": TURNS
    + "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{% if p.type == 'text' %}{{ p['text'] }}{% endif %}"
    + "{% endfor %}{% endif %}"
    + END,
    "tools": "{% if tools is not none %}{% for t in tools %}{{ t | tojson(indent=4) }}{{ t.function | tojson }}{% endfor %}{% endif %}"
    + TURNS
    + "{% if m.tool_calls is defined %}{% for c in m.tool_calls %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}"
    + "{% elif m.reasoning_content %}[{{ m.reasoning_content }}]{% endif %}{{ m.content }}"
    + END,
    "asks": "{% for v in [tools, messages, messages[0], messages[0].content, nothing, none, 1, 1.5, true, messages[1:], messages + messages] %}"
    + "{{ v is iterable }}{{ v is sequence }}{{ v is mapping }}{{ v is string }}{{ v is none }}{{ v is defined }}{{ v is boolean }} {% endfor %}"
    + "{# tool_calls reasoning_content #}",
    "whole": "{% for m in messages %}{{ m | tojson }}{{ m | tojson(indent=2, ensure_ascii=True, sort_keys=True) }}"
    + "{{ m | tojson(separators=(',', ':')) }}{{ m | tojson(indent=0) }}{% endfor %}{# tool_calls reasoning_content #}",
}


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


CALL = [{"id": "c0", "type": "function", "function": {"name": "area", "arguments": {"wide": 2, "high": [1.5, 1e-7, 1e16, -3, None, True]}}}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "area",
            "description": "Of <a> & \"b\", 'é' \U0001f6a3\n",
            "parameters": {"type": "object", "properties": {"wide": {"type": "number", "minimum": 1e-05}, "high": {}}, "required": []},
        },
    }
]
ASKED = turn("user", " How large?")
CASES = {
    "parts": ([turn("system", parts("Short.")), turn("user", parts("It's \"a\"", "\n\\b \U0001f6a3"))], None, False),
    "continued": ([ASKED, turn("assistant", "As large as")], None, True),
    "continued, space behind": ([ASKED, turn("assistant", " As large as \n")], None, True),
    "continued, separator behind": ([ASKED, turn("assistant", "As\x1f")], None, True),
    "continued, empty": ([ASKED, turn("assistant", "")], None, True),
    "continued, the same said before": ([turn("user", "a"), turn("assistant", "a"), turn("user", "a"), turn("assistant", "a")], None, True),
    "continued, the user's": ([ASKED], None, True),
    "continued, parts": ([ASKED, turn("assistant", parts("As", "large "))], None, True),
    "tools": ([ASKED], TOOLS, False),
    "no tools": ([ASKED], [], False),
    "called": ([ASKED, {"role": "assistant", "tool_calls": CALL}, turn("tool", "3", tool_call_id="c0", name="area")], TOOLS, False),
    "called, null": ([ASKED, turn("assistant", None, tool_calls=CALL), turn("tool", parts("3"))], TOOLS, False),
    "thought": ([ASKED, turn("assistant", "3", reasoning="hm"), ASKED], None, False),
    "thought, another name": ([ASKED, turn("assistant", "3", thinking="hm"), ASKED], None, False),
}

tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **SPECIAL)
found = []
for template, text in TEMPLATES.items():
    tokenizer.chat_template = text
    for case, (messages, tools, continues) in CASES.items():
        how = {"continue_final_message": True} if continues else {"add_generation_prompt": True}
        try:
            said = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **how)
        except Exception:
            said = None
        found.append({"template": template, "case": case, "said": said})
cases = [{"case": case, "messages": m, "tools": t, "continue_final_message": c} for case, (m, t, c) in CASES.items()]
whole = {"templates": TEMPLATES, "cases": cases, "found": found}
place = pathlib.Path(__file__).parent / "chat.json"
place.write_text(json.dumps(whole, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
print(len(found), sum(one["said"] is not None for one in found))
