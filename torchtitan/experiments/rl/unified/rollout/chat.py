# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""Conversations to tokens by a checkpoint's chat template, and what template and tokenizer can be wrong about."""

import datetime
import re
from collections.abc import Collection, Sequence
from typing import Any

import jinja2
import jinja2.meta
import jinja2.nodes
from torchtitan.experiments.rl.unified.rollout.rows import Row
from torchtitan.experiments.rl.unified.tokenizer import render, special_tokens
from transformers import PreTrainedTokenizerBase

# What marks in a text where a special token is cut in two is one of the private use area that the text has not.
_PRIVATE = range(0xE000, 0xF900)


class ChatTemplate:
    """A tokenizer's chat template with its arguments.

    Args:
        tokenizer: has the template.
        arguments: more of its arguments, such as Qwen3's ``enable_thinking``.
        system_prompt: a system message to put before each conversation; empty: none.
        special_tokens_in_text: a special token's name in a row is the token, not text.
        date: the day, in ISO format, that the template gets when it asks for today's; empty: one that asks is refused.

    Raises:
        ValueError: no template, or it does not read one of the arguments.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        arguments: dict[str, Any],
        system_prompt: str = "",
        special_tokens_in_text: bool = False,
        date: str = "",
    ) -> None:
        self.tokenizer, self.system_prompt, self.date = tokenizer, system_prompt, date
        # transformers gives a template the clock under this name.
        self.arguments = {"strftime_now": self._strftime_now, **arguments}
        if not tokenizer.chat_template:
            raise ValueError(f"The tokenizer of {tokenizer.name_or_path or 'this model'} has no chat template.")
        names = [] if special_tokens_in_text else special_tokens(tokenizer)
        self._special = re.compile(
            "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) or r"\b\B"
        )
        if given := {"messages", "add_generation_prompt"} & set(arguments):
            raise ValueError(f"[data] template_kwargs: {', '.join(sorted(given))} is what the job itself sets")
        known = _variables(tokenizer)
        if unread := sorted(set(arguments) - known):
            raise ValueError(
                f"[data] template_kwargs: the chat template of {tokenizer.name_or_path} reads no {', '.join(unread)}; "
                f"it reads {', '.join(sorted(known))}"
            )

    def encode(self, rows: Sequence[Row]) -> list[tuple[str, list[int]]]:
        """What the model reads for each of `rows`: text and tokens.

        Raises:
            ValueError: the template fails on a row, takes too long, or leaves out what it was given.
        """
        texts: list[tuple[str, str]] = []
        for row in rows:
            try:
                texts.append(self._render(row))
            except ValueError as error:
                asked = self.system_prompt or self.arguments.keys() - {"strftime_now"}
                hint = "; look at [data] system_prompt and template_kwargs" if asked else ""
                raise ValueError(f"the tokenizer's chat template fails on {row.place}: {error}{hint}") from error
        uncut = [text.replace(mark, "") for text, mark in texts]
        encoded = self.tokenizer(uncut, add_special_tokens=False)["input_ids"]
        for index, (text, mark) in enumerate(texts):
            if mark in text:
                pieces = self.tokenizer(text.split(mark), add_special_tokens=False)["input_ids"]
                encoded[index] = [token for piece in pieces for token in piece]
        return list(zip(uncut, encoded, strict=True))

    def _render(self, row: Row) -> tuple[str, str]:
        """The row in the template, and the mark where special tokens in its text are cut in two."""
        messages = [dict(message) for message in row.messages]
        if self.system_prompt:
            if messages[0]["role"] == "system":
                raise ValueError("the row has a system message of its own beside [data] system_prompt")
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        given = "".join(message["content"] for message in messages)
        mark = next(chr(code) for code in _PRIVATE if chr(code) not in given)
        for message in messages:
            message["content"] = self._special.sub(lambda name: f"{name[0][0]}{mark}{name[0][1:]}", message["content"])
        text = render(self.tokenizer, messages, add_generation_prompt=True, **self.arguments)
        for message in messages:
            # A template may leave out what an assistant thought, turns ago.
            said = (
                message["content"].rpartition("</think>")[2] if message["role"] == "assistant" else message["content"]
            )
            if said.strip() not in text:
                raise ValueError(f"it leaves out the {message['role']}'s message {ascii(message['content'][:60])}")
        return text, mark

    def _strftime_now(self, form: str) -> str:
        if not self.date:
            raise ValueError(
                "it asks for today's date, and would make other prompts tomorrow: say which it is to write, [data] "
                f'date = "{datetime.date.today()}"'
            )
        return datetime.datetime.fromisoformat(self.date).strftime(form)


def check_stop(tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], special_tokens_in_text: bool) -> None:
    """Each of the strings that end a completion can come up in its text, or is a special token.

    Raises:
        ValueError: one has a special token's name in it, which is left out of the text.
    """
    names = special_tokens(tokenizer)
    for text in stop:
        held = [name for name in names if name in text and name != text]
        if held and text not in names and not special_tokens_in_text:
            raise ValueError(
                f"[sampling] stop {text!r} would never come up: {held[0]!r} in it is a special token, which the text "
                "of a completion leaves out. Set [sampling] special_tokens_in_text = true, or stop at that token alone"
            )


def check_turn_end(tokenizer: PreTrainedTokenizerBase, eos_ids: Collection[int], stop: Sequence[str] = ()) -> None:
    """What the chat template ends an assistant's turn with ends a completion.

    Args:
        tokenizer: has the template; one that says nothing of an assistant's turn, or of its end, passes.
        eos_ids: the tokens that end a completion.
        stop: the strings that do.

    Raises:
        ValueError: it does not, so that every completion would run on to its token limit.
    """
    answer = "An answer"
    messages = [{"role": "user", "content": "A question"}, {"role": "assistant", "content": answer}]
    try:
        _, found, end = render(tokenizer, messages).rpartition(answer)
    except ValueError:
        return
    ids = tokenizer(end.strip(), add_special_tokens=False)["input_ids"]
    if not found or not ids or not set(ids).isdisjoint(eos_ids) or any(text in end for text in stop):
        return
    names = ", ".join(repr(tokenizer.decode([token])) for token in sorted(eos_ids)) or "nothing"
    remedy = (
        f"add {ids[0]} to eos_token_id in the checkpoint's generation_config.json"
        if len(ids) == 1
        else "put that into [sampling] stop"
    )
    raise ValueError(
        f"the chat template of {tokenizer.name_or_path} ends a turn with {end.strip()!r}, but what ends a completion "
        f"is {names}: each would run on to its limit. If the model was trained with this template, {remedy}; if not, "
        "take the template that it was trained with"
    )


def _variables(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The names that the chat template reads and does not set."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        template = tokenizer.get_chat_template()
        # transformers' environment knows the tags that it adds.
        tree = _compile_jinja_template(template).environment.parse(template)
        names = set(jinja2.meta.find_undeclared_variables(tree))
    # ValueError: several templates, none of them the default; TypeError: it is not text.
    except (jinja2.TemplateError, ValueError, TypeError) as error:
        raise ValueError(f"the chat template of {tokenizer.name_or_path} is no template: {error}") from error
    used = {node.name for node in tree.find_all((jinja2.nodes.Filter, jinja2.nodes.Name))}
    if drawn := sorted(used & {"random", "lipsum"}):
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path} draws by lot ({drawn[0]}), and would make other prompts at "
            "each start: take that out of it"
        )
    return names
