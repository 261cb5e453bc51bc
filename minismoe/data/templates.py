"""A checkpoint's chat template: read from its folder, and rendered by jinja2.

Its sandbox denies a template files and code. As in transformers, nothing limits the time and memory
that a template takes; only the length of what it writes is limited.
"""

import json
import re
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from ..io.files import inside, naming

# Plain text that every tokenizer can encode; an assistant turn ends with the end-of-text token. The
# space before an answer belongs to the answer: BPE has one token for " yes", which a prompt that
# ends in a space would split at inference but not in training.
DEFAULT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'assistant' %}Assistant: {{ message.content }}{{ eos_token }}\n"
    "{% else %}{{ message.role.capitalize() }}: {{ message.content }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}")
# Put before a template with this switch: data hold answers, not thoughts, and every program that
# opens an export should ask as training did.
NO_THINKING = "{%- set enable_thinking = enable_thinking | default(false) %}"
LENGTH = 1 << 24                 # characters of the rendered text
TODAY = datetime(2024, 7, 26)    # Llama 3's default; a real date would change prompts on --resume


class Refused(ValueError):
    """The template raised an exception for these values."""


def render(template: str, values: Mapping[str, Any]) -> str:
    """The text of a template with `values`.

    Raises Refused, ValueError if the template is broken or writes more than LENGTH characters, and
    ModuleNotFoundError without jinja2.
    """
    compiled, text = _compiled(template), ""
    try:
        for piece in compiled.generate(values):
            text += piece
            if len(text) > LENGTH:
                break
    except Exception as e:                       # a template can raise anything
        raise Refused(f"the chat template fails: {_one_line(e)}") from None
    if len(text) > LENGTH:
        raise ValueError(f"the chat template writes more than {LENGTH >> 20} M characters")
    return text


@lru_cache(8)
def _compiled(template: str) -> Any:
    """The template, ready for `generate`; ValueError if jinja2 cannot read it."""
    try:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as e:
        raise ModuleNotFoundError(
            f"the chat template needs jinja2: pip install jinja2 ({_one_line(e)})") from None

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    # White space is trimmed as in transformers, for which templates are written.
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                        extensions=["jinja2.ext.loopcontrols"])
    env.globals |= {"raise_exception": raise_exception, "strftime_now": TODAY.strftime}
    env.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    # {% generation %} marks supervised text in some templates; here it is a block without effect.
    template = re.sub(r"({%[-+]?\s*(?:end)?)generation\b", r"\1with", template)
    try:
        return env.from_string(template)
    except Exception as e:                       # a template can be too deep for Python, too
        raise ValueError(f"the chat template is broken: {_one_line(e)}") from None


def chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The template of a checkpoint folder, or None; ValueError if it is not text. If chats with
    tools have one of their own, both become one. Its switch for thinking is off unless set."""
    file, template = inside(folder, "chat_template.jinja"), settings.get("chat_template")
    if file.is_file():
        with naming(f"{file} is not UTF-8 text", ValueError):
            template = file.read_text(encoding="utf-8")
    if isinstance(template, list):           # several with names: [{"name": ..., "template": ...}]
        named = {str(t.get("name")): t.get("template") for t in template if isinstance(t, dict)}
        template, other = named.get("default"), named.get("tool_use")
        if isinstance(template, str) and isinstance(other, str):     # {{ '' }} keeps line ends
            a, b = ("{{ '' }}" + text.removesuffix("\n") + "{{ '' }}" for text in (other, template))
            template = f"{{% if tools %}}{a}{{% else %}}{b}{{% endif %}}"
    if not isinstance(template, str | None):
        raise ValueError(f"{folder / 'tokenizer_config.json'}: its chat_template is not text")
    if template and "enable_thinking" in template and not template.startswith(NO_THINKING):
        template = NO_THINKING + template
    return template


def _one_line(e: Exception) -> str:
    return " ".join(f"{type(e).__name__}: {e}"[:400].split())
