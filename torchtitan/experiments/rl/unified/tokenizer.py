# All rights reserved.
#
# This source code is licensed under the BSD-style license found in the
# LICENSE file in the root directory of this source tree.

"""The one door to a checkpoint's tokenizer: loaded by transformers, held against the checkpoint's own files."""

import contextlib
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tokenizers import Tokenizer
from torchtitan.experiments.rl.unified.config.checkpoint_path import read_json
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

# Longest time for one prompt; a template is a program, and may not end.
RENDER_SECONDS = 5.0


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in the checkpoint directory `path`.

    Raises:
        ValueError: in one line: transformers loads none, or it would cut words otherwise each time.
    """
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (file := Path(path) / name).is_file():
            read_json(file)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    # Damaged files end in errors of many classes, plain Exception among them.
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"transformers loads no tokenizer from {path}: {said[:400]}") from None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if dropout := getattr(backend and backend.model, "dropout", None):
        raise ValueError(
            f"{path}/tokenizer.json has a dropout of {dropout:g}, which cuts a text otherwise each time: set it to null"
        )
    return tokenizer


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], **arguments: Any) -> str:
    """The text of `messages` by the tokenizer's chat template.

    Raises:
        ValueError: it failed, or was not done within `RENDER_SECONDS` (looked at in the main thread alone).
    """
    try:
        with _limited(RENDER_SECONDS):
            return tokenizer.apply_chat_template(messages, tokenize=False, **arguments)
    except Exception as error:  # Of any class: it is anyone's program.
        raise ValueError(str(error) or type(error).__name__) from error


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def give_up(number: int, frame: Any) -> NoReturn:
        raise ValueError(f"it computes for more than {seconds:g} s")

    # Of this process's own time: on a busy machine, or one that was suspended, a clock's seconds say nothing.
    handler = signal.signal(signal.SIGVTALRM, give_up)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, handler)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The names of `tokenizer`'s special tokens; an empty one, which stands in no text, is not among them."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return [name for name in dict.fromkeys([*added, *tokenizer.all_special_tokens]) if name]


def end_ids(tokenizer: PreTrainedTokenizerBase, path: str | Path, vocabulary: int) -> list[int]:
    """The tokens that end a completion, as vLLM has them for the checkpoint in `path`.

    The tokenizer's own EOS, and eos_token_id of generation_config.json, or of config.json if there is no such file.

    Args:
        tokenizer: from `load_tokenizer`.
        path: the checkpoint's directory.
        vocabulary: tokens of the model.

    Raises:
        ValueError: names the file that is damaged, or that has another model's token.
    """
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if own and not 0 <= own[0] < vocabulary:
        raise ValueError(
            f"{path}: the tokenizer's eos_token {tokenizer.eos_token!r} is token {own[0]}, but the model's vocabulary "
            f"has {vocabulary}: correct it in tokenizer_config.json (or special_tokens_map.json)"
        )
    file = Path(path) / "generation_config.json"
    if file.is_file():
        read_json(file)
    try:
        if file.is_file():
            ids = GenerationConfig.from_pretrained(path, local_files_only=True).eos_token_id
        else:
            ids = AutoConfig.from_pretrained(path, local_files_only=True).eos_token_id
    # As above.
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"transformers does not read {file}: {said[:400]}") from None
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if odd := [each for each in ids if type(each) is not int or not 0 <= each < vocabulary]:
        raise ValueError(f"{file}: eos_token_id {odd[0]!r} is not one of the model's {vocabulary} tokens")
    return list(dict.fromkeys([*own, *ids]))


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, path: str | Path, texts: Sequence[str]) -> None:
    """`tokenizer`, as transformers loads it, gives the tokens that the checkpoint's own tokenizer.json gives.

    Args:
        tokenizer: from `load_tokenizer`.
        path: the checkpoint's directory; one without tokenizer.json has nothing to compare with.
        texts: to encode with both.

    Raises:
        ValueError: names the tokenizer's class and the first text that differs.
    """
    file = Path(path) / "tokenizer.json"
    if not file.is_file():
        return
    own = Tokenizer.from_file(str(file))
    # transformers applies neither unless it is asked to.
    own.no_truncation()
    own.no_padding()
    if not texts:
        return
    found = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    for text, ids, right in zip(texts, found, own.encode_batch_fast(texts, add_special_tokens=False), strict=True):
        if ids != (expected := right.ids):
            raise ValueError(
                f"transformers makes a {type(tokenizer).__name__} of {path}, which does not encode as its "
                f"tokenizer.json does: {ascii(text[:60])} gives {ids[:8]} and should give {expected[:8]}. Look at "
                'its tokenizer_config.json: set "tokenizer_class": "PreTrainedTokenizerFast", and leave out '
                "split_special_tokens"
            )
