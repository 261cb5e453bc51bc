"""Answers that parse: grammars of JSON and of calls, of which llguidance makes masks of tokens."""

import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from ..data.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer
from ..data.tools import SHOWN, WRITTEN, Function
from ..io.text import clean

# As json.dumps and templates write it. Where small models may write white space, some never stop.
# A grammar cannot count how many parts of a oneOf fit, so any of them may.
FORMAT = {"x-guidance": {"whitespace_flexible": False, "item_separator": ", ",
                         "key_separator": ": ", "coerce_one_of": True}}
CALLS = 8                                    # of one answer: small models go on calling
LARGEST = 32_000                             # bytes of a schema


def json_grammar(schema: Any) -> str:
    """The grammar of a JSON value that a schema describes; ValueError if the schema is no object,
    or larger than LARGEST."""
    if not isinstance(schema, dict):
        raise ValueError("the schema is no JSON object")
    return f"start: {_json(schema)}"


def _json(schema: Mapping[str, Any]) -> str:
    text = json.dumps({**schema, **FORMAT})
    if len(text) > LARGEST:                  # to compile it would take long
        raise ValueError(f"the schema has {len(text):,} bytes: at most {LARGEST:,} are read")
    return f"%json {text}"


def call_grammar(tokenizer: Tokenizer, tools: Sequence[Function]) -> str:
    """The grammar of text, or of up to CALLS calls of `tools` as the template writes them; where it
    marks calls, text may stand around them.

    Raises ValueError if the template writes calls otherwise than as JSON.
    """
    ids = tokenizer.turn(SHOWN)
    form = WRITTEN.search(tokenizer.decode(ids))
    if not form:
        raise ValueError("the chat template writes calls otherwise than as JSON: leave out what "
                         "holds answers to them")
    text = partial(_literal, tags=_tags(tokenizer.backend))
    mark, opening, head, middle, tail, closing = form.group(
        "mark", "opening", "head", "middle", "tail", "closing")
    before = text(mark)
    end = text(tail).replace("123456789", '" /[0-9A-Za-z]{9}/ "')           # an id
    more = f'(", " call){{0,{CALLS - 1}}}' if "[" in opening else ""
    rules = [f"call: {' | '.join(f'call{n}' for n in range(len(tools)))}", "TEXT: /(.|\\n)*/",
             f"body: {text(opening)} call {more} {text(closing)}"]
    for number, tool in enumerate(tools):
        name = json.dumps(tool["function"]["name"], ensure_ascii=False)
        schema = {"type": "object", **(tool["function"].get("parameters") or {})}
        if "properties" in schema:           # small models go on adding arguments
            schema.setdefault("additionalProperties", False)
        rules.append(f"call{number}: {text(head + name + middle)} {_json(schema)} {end}")
    if ids and ids[0] in tokenizer.special.values():             # as Mistral's [TOOL_CALLS]
        start = f"TEXT (<[{ids[0]}]> {before} body)?"
    elif before:
        lazy = "" if before.startswith("<") else "[lazy]"        # text ends at a tag in any case
        rules.append(f"mark{lazy}: TEXT {before}")
        start = "(mark body)* TEXT"
    else:
        rules.append("OTHER: /([^\\[{ \\n](.|\\n)*)?/")
        start = "OTHER | body"
    return "\n".join([f"start: {start}", *rules])


def _tags(backend: ByteTokenizer | FileTokenizer) -> dict[str, int]:
    """Added tokens such as Qwen's <tool_call>: llguidance keeps all of the form <...> apart from
    text, also those that are not special."""
    if isinstance(backend, ByteTokenizer):
        return {}
    added = backend.backend.get_added_tokens_decoder().items()
    return {token.content: i for i, token in added if re.fullmatch("<.+>", token.content)}


def _literal(text: str, tags: Mapping[str, int]) -> str:
    """A literal of the grammar's language, with tags by their ids."""
    parts = re.split(f"({'|'.join(map(re.escape, tags))})", text) if tags else [text]
    return " ".join(f"<[{tags[part]}]>" if part in tags else json.dumps(part, ensure_ascii=False)
                    for part in parts if part)


def grammar_tokens(tokenizer: Tokenizer, vocab_size: int) -> Any:
    """The tokenizer as llguidance has it; ModuleNotFoundError, with the pip command, without it."""
    try:
        from llguidance import LLTokenizer, TokenizerWrapper
    except ImportError:
        raise ModuleNotFoundError("answers by a schema need llguidance: pip install "
                                  "'llguidance>=1.5'") from None
    backend, ends = tokenizer.backend, tokenizer.stop_ids
    if not ends:
        raise ValueError("the tokenizer has no token that ends an answer")
    if isinstance(backend, FileTokenizer):
        return LLTokenizer(backend.backend.to_str(), vocab_size, ends)

    class Bytes:
        eos_token_id, bos_token_id = ends[0], None
        tokens = [*(bytes([n]) for n in range(256)), *map(str.encode, backend.special)]
        special_token_ids = [*backend.special.values()]

        def __call__(self, text: bytes) -> list[int]:
            return [*text]

    return LLTokenizer(TokenizerWrapper(Bytes()), vocab_size, ends)


def new_matcher(tokens: Any, grammar: str) -> Any:
    """What follows one answer token by token; ValueError if the grammar cannot be compiled.

    tokens: as of `grammar_tokens`.
    """
    from llguidance import LLMatcher
    wrong, messages = LLMatcher.validate_grammar_with_warnings(grammar, tokens)
    if wrong:
        reason = messages[0].partition("\n   1 | ")[0]   # then it shows the whole grammar
        raise ValueError(f"the schema cannot be compiled: {clean(' '.join(reason.split()))}")
    return LLMatcher(tokens, grammar, log_level=0)


def allowed(matcher: Any) -> bytes:
    """The tokens that may come next, a bit each; ValueError if there is none."""
    mask: bytes = matcher.compute_bitmask()
    _refuse_errors(matcher)
    return mask


def follow(matcher: Any, token: int, most: int) -> list[int]:
    """Let a matcher take a token; returns up to `most` tokens that alone may follow, which it has
    taken, too. They are canonical: the tokenizer writes their text so. Raises ValueError if there
    is no end of them."""
    matcher.consume_token(token)
    forced: list[int] = matcher.compute_ff_tokens()[:most] if most else []
    _refuse_errors(matcher)
    matcher.consume_tokens(forced)
    return forced


def _refuse_errors(matcher: Any) -> None:
    """Raise ValueError with the first line of a matcher's error, if there is any."""
    if matcher.is_error():
        reason = clean(matcher.get_error().partition("<state>")[0].strip())
        raise ValueError(f"the schema is too complex, or no value that ends matches it: {reason}")
