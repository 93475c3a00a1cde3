"""Writes chat.json: conversations with parts, tools, calls and messages to continue, as transformers renders them by templates written
for this, or that it refuses them; and which template it takes of those that a directory holds. Run with transformers 5.24:
python tests/goldens/chat.py"""

import datetime
import json
import pathlib
import tempfile

from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

TODAY = datetime.datetime(2026, 11, 26, 12, 34, 56)


class Clock(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return TODAY


chat_template_utils.datetime = Clock

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
    "line ends": TURNS.replace("\n", "\r\n") + "{{ 'a\r\nb' }}\r{{ m.content }}\r\n" + END.replace("\n", "\r\n"),
    "shown": "{% for m in messages %}{{ m }}{{ m.content }}{{ m.content | string }}{{ m.items() | list }}{% endfor %}{{ tools }}"
    + "{{ (1, 'a') }}{{ none }}{{ true }}{{ 1e-7 }}{{ 2.0 }}{{ [] }}{{ {} }}{{ '\x07' }}{# tool_calls reasoning_content documents #}",
    "day": TURNS + "{{ strftime_now('%Y-%m-%d, %A %-d %B') }}{{ strftime_now is defined }}{{ m.content | string }}" + END,
    "marked": "{% set x = 1 %}{%- generation -%} {% set x = 2 %}{% set y = 3 %}{{ x }} {%- endgeneration %}{{ x }}{{ y is defined }}"
    + "{{ [nothing, none] }}{{ messages[0].content }}",
    "escapes": "{{ messages[0].content }}{% autoescape true %}{{ '<' }}{% endautoescape %}",
    "asked": "{% if enable_thinking is defined and enable_thinking is false %}off{% endif %}{{ level | default('none') }}{{ bos_token }}"
    + "{{ sep_token is defined }}{% for d in documents or [] %}[{{ d.title }}: {{ d['text'] }}]{% endfor %}{{ messages[0].content }}",
    "safe": "{{ '<' | safe }}{{ '</a> & \"b\"' | e }}{{ \"it's\" | escape | e }}{{ '<' | safe | e }}"
    + "{{ (messages[0].content | tojson | safe) ~ '<' }}{{ tools | tojson | safe | string }}"
    + "{% if tools and tools[0].add %}{{ '<' | safe + tools[0].add }}{% endif %}",
    "texts or nothing": TURNS + "{% if m.content is string %}{{ m.content }}{% endif %}" + END,
    "late": "{% for m in messages %}{% if loop.last %}{{ m.content if m.content is string else m.content[0].text }}{% endif %}{% endfor %}",
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
DOCUMENTS = [{"title": "One", "text": "é <b>"}, {"title": "Two", "text": "\n"}]
ODD = [{"type": "function", "function": {"name": "f", "description": "\u200b\u2028\xa0\x07\u0301e\u0301\U000e0001\U0001f6a3'\"\\\t"}}]
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
    "one part": ([ASKED, turn("assistant", parts("3")), turn("user", parts("why"))], None, False),
    "continued, one part": ([ASKED, turn("assistant", parts("As large "))], None, True),
    "nothing in it": ([ASKED, turn("assistant", "3", tool_calls=[], reasoning_content="", refusal=None, annotations=[]), ASKED], [], False),
    "odd tools": ([ASKED], ODD, False),
    "added": ([ASKED], [{"add": "<"}], False),
    "thought": ([ASKED, turn("assistant", "3", reasoning="hm"), ASKED], None, False),
    "thought, another name": ([ASKED, turn("assistant", "3", thinking="hm"), ASKED], None, False),
}

VARIABLES = {"asked, off": {"enable_thinking": False, "level": 1.5}, "asked, of its own": {"level": ["a"], "bos_token": "B"}}
VARIABLES["asked, of its own"]["sep_token"] = "s"
CASES |= {name: ([ASKED], None, False) for name in VARIABLES}
CASES["documents"] = ([ASKED], None, False)

tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **SPECIAL)
found = []
for template, text in TEMPLATES.items():
    tokenizer.chat_template = text
    for case, (messages, tools, continues) in CASES.items():
        how = {"continue_final_message": True} if continues else {"add_generation_prompt": True}
        how |= VARIABLES.get(case, {}) | ({"documents": DOCUMENTS} if case == "documents" else {})

        def said(messages):
            try:
                return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **how)
            except Exception:
                return None

        texts = [{**m, "content": "".join(p["text"] for p in m["content"])} if isinstance(m.get("content"), list) else m for m in messages]
        of_texts = {"of texts": said(texts)} if texts != messages else {}
        found.append({"template": template, "case": case, "said": said(messages)} | of_texts)
cases = [
    {
        "case": case,
        "messages": m,
        "tools": t,
        "continue_final_message": c,
        "chat_template_kwargs": VARIABLES.get(case),
        "documents": DOCUMENTS if case == "documents" else None,
    }
    for case, (m, t, c) in CASES.items()
]

OTHERS = "additional_chat_templates/"


def config(templates):
    return json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": None, "chat_template": templates})


NAMED = {"default": "D{{ bos_token }}{{ eos_token is defined }}", "tool_use": "T{{ tools | length }}", "rag": "R{{ documents | length }}"}
LIST = [{"name": name, "template": text} for name, text in NAMED.items()]
DIRECTORIES = [
    {
        "chat_template.jinja": "one\n",
        OTHERS + "tool_use.jinja": "tools\r\n{{ tools | length }}\n\n",
        OTHERS + "a b.c.jinja": "{{ bos_token }}",
    },
    {"chat_template.jinja": "one", OTHERS + "rag.jinja": "{{ documents }}", "tokenizer_config.json": config(LIST)},
    {OTHERS + "rag.jinja": "rag", "tokenizer_config.json": config(LIST)},
    {OTHERS + "default.jinja": "of the folder", "chat_template.jinja": "of the file"},
    {OTHERS + "tool_use.jinja": "tools", OTHERS + "notes.txt": "left", OTHERS + "deep/rag.jinja": "left"},
    {"tokenizer_config.json": config(LIST)},
    {"tokenizer_config.json": config(LIST[1:])},
    {"tokenizer_config.json": config(LIST + [{"name": "default", "template": "the later"}])},
    {"tokenizer_config.json": config("one {{ tools }}")},
    {"chat_template.jinja": "{% broken", OTHERS + "tool_use.jinja": "whole"},
    {"chat_template.jinja": "whole", OTHERS + "tool_use.jinja": "{% broken"},
]
TOKENIZER = Tokenizer(models.BPE({"<s>": 0, "</s>": 1, "a": 2}, []))
directories = []
for files in DIRECTORIES:
    with tempfile.TemporaryDirectory() as place:
        place = pathlib.Path(place)
        TOKENIZER.save(str(place / "tokenizer.json"))
        for name, text in {"tokenizer_config.json": config(None), **files}.items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(text.encode())
        loaded = AutoTokenizer.from_pretrained(place)
        names = loaded.chat_template if isinstance(loaded.chat_template, dict) else []
        asked = []
        for name in [None, *names]:
            for tools, documents in [(None, None), ([], None), (TOOLS, None), (None, DOCUMENTS)]:
                try:
                    chosen = loaded.apply_chat_template([ASKED], chat_template=name, tools=tools, documents=documents, tokenize=False)
                except Exception:
                    chosen = None
                asked.append({"chat_template": name, "tools": tools, "documents": documents, "said": chosen})
        directories.append({"files": {"tokenizer_config.json": config(None), **files}, "asked": asked})

whole = {"templates": TEMPLATES, "today": f"{TODAY:%Y-%m-%d}", "cases": cases, "found": found}
whole |= {"tokenizer": TOKENIZER.to_str(), "directories": directories}
text = json.dumps(whole, ensure_ascii=False)
for key in ["template", "case", "files"]:
    text = text.replace(f'{{"{key}":', f'\n{{"{key}":')
assert json.loads(text) == whole
place = pathlib.Path(__file__).parent / "chat.json"
place.write_text(text + "\n", encoding="utf-8")
print(len(found), sum(one["said"] is not None for one in found), sum(len(one["asked"]) for one in directories))
