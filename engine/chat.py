"""From messages to token ids: chat templates and the response mask.

The response mask marks the tokens that the assistant writes and must learn to write: its text and the token that
ends its turn, never a header or anything else that the template puts around it. It is built from character
positions in the rendered conversation, never by comparing ids, so that a pad token equal to eos hides nothing.

A template with `{% generation %}` says itself what the assistant writes. For any other, a turn begins where the
rendered conversation leaves the generation prompt, and its text ends where the rendering with a marker in its
place says so. A rendering that does not fit its own prefixes raises; nothing is guessed.

Nothing here knows of models, ranks or datasets. No collectives. Tokenizers must have passed
`engine.tokenizer.prepare_tokenizer`.
"""

from __future__ import annotations

import functools
import logging
import os
import re

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

logger = logging.getLogger(__name__)

Message = dict[str, str]
Encoded = tuple[list[int], list[int], list[bool]]  # prompt_ids, input_ids, response_mask

GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
MARKER = "\ue000\ue001\ue000"  # private-use characters: stands for an answer, survives trimming and splitting


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], first_response: int = 0
) -> Encoded:
    """Token ids of a conversation, with the assistant's tokens marked.

    `prompt_ids` is the conversation up to its last assistant turn, with the generation prompt. A conversation that
    does not end in an assistant turn is a prompt: `input_ids == prompt_ids` and nothing is marked. Assistant turns
    before message number `first_response` are context and are not marked.

    A token that joins template and assistant text (a header's last space and the first word) is marked if its
    assistant part is more than white space.

    Raises:
        ValueError: where the template refuses the conversation, or its rendering does not show where a turn is.
    """
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= first_response]
    if not turns or turns[-1] != len(messages) - 1:
        prompt_ids = encode_prompt(tokenizer, messages)
        return prompt_ids, list(prompt_ids), [False] * len(prompt_ids)
    if GENERATION_TAG.search(tokenizer.get_chat_template()):
        text, spans = render_tagged(tokenizer, messages)
        if first_response:
            spans = spans[len(render_tagged(tokenizer, messages[:first_response])[1]) :]
        if not spans:
            raise ValueError(
                "the chat template has {% generation %} but marks nothing in a conversation with an answer"
            )
    else:
        text = render(tokenizer, messages)
        spans = [locate_turn(tokenizer, text, messages, turn) for turn in turns]
    input_ids, response_mask = mark_tokens(tokenizer, text, spans)
    return encode_prompt(tokenizer, messages[: turns[-1]]), input_ids, response_mask


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> list[int]:
    """Token ids of the conversation so far and the generation prompt: what a rollout starts from."""
    text = render(tokenizer, messages, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def encode_prompt_completion(
    tokenizer: PreTrainedTokenizerBase, prompt: str | list[Message], completion: str | list[Message] | None
) -> Encoded:
    """Token ids of a prompt and its completion, both text or both lists of messages; None is a prompt alone.

    Plain text gets bos where the tokenizer writes one, no template, and eos after the completion. Prompt and
    completion are tokenised together; a token that joins them counts as completion.
    """
    if isinstance(prompt, list) and not isinstance(completion, str):
        return encode_conversation(tokenizer, prompt + (completion or []), first_response=len(prompt))
    if isinstance(prompt, list) or isinstance(completion, list):
        raise ValueError("prompt and completion must both be text or both be lists of messages")
    first = tokenizer(prompt, verbose=False)["input_ids"][:1]
    bare = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
    bos = first if first == [tokenizer.bos_token_id] and bare[:1] != first else []
    if completion is None:
        return bos + bare, bos + bare, [False] * len(bos + bare)
    text = prompt + completion
    input_ids, response_mask = mark_tokens(tokenizer, text, [(len(prompt), len(text))])
    if input_ids[-1] != tokenizer.eos_token_id:
        input_ids, response_mask = input_ids + [tokenizer.eos_token_id], response_mask + [True]
    return bos + bare, bos + input_ids, [False] * len(bos) + response_mask


def render(tokenizer: PreTrainedTokenizerBase, messages: list[Message], add_generation_prompt: bool = False) -> str:
    """The conversation as the template writes it; ValueError with the template's words where it refuses."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except TemplateError as error:
        raise ValueError(f"the chat template refuses this conversation: {error}") from error


def render_tagged(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation and the character spans inside `{% generation %}`.

    `apply_chat_template(return_assistant_tokens_mask=True)` would mark all that follows a span whose last
    character lies in no token (a byte-level tokenizer that trims offsets); the spans themselves are right.
    """
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    try:
        texts, spans = render_jinja_template(
            conversations=[messages],
            chat_template=tokenizer.get_chat_template(),
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    except TemplateError as error:
        raise ValueError(f"the chat template refuses this conversation: {error}") from error
    return texts[0], [(start, end) for start, end in spans[0] if end > start]


def locate_turn(tokenizer: PreTrainedTokenizerBase, text: str, messages: list[Message], turn: int) -> tuple[int, int]:
    """Characters of `text`, the rendered `messages`, that the assistant writes in message number `turn`.

    The span starts behind the generation prompt, since what follows it is what the model is asked to write
    (Qwen3's empty think block included). Templates whose generation prompt is no prefix of the conversation (it
    opens a think block, or the system text moves to the last user turn) start at the message's own text.

    Raises:
        ValueError: where neither is a prefix of the conversation, or the template ignores the generation prompt.
    """
    head, tail = render_around(tokenizer, messages, turn)
    prompt = render(tokenizer, messages[:turn], add_generation_prompt=True)
    if text.startswith(prompt):
        start = len(prompt)
        header = head[start:] if head.startswith(prompt) else ""
        if header.strip() and prompt == render(tokenizer, messages[:turn]):
            raise ValueError(
                f"the chat template writes {header!r} before an answer but ignores add_generation_prompt, so a "
                "rollout could not begin: add `{% if add_generation_prompt %}` to the template"
            )
    elif text.startswith(head):
        start = len(head)
    else:
        raise not_located(turn, "the generation prompt is not a prefix of the conversation")
    if messages[turn].get("tool_calls"):
        return start, start + tool_calls_end(
            tokenizer, text[start:], render(tokenizer, messages[: turn + 1])[start:], turn
        )
    end = len(text) - len(tail)
    if end < start or not text.endswith(tail):
        raise not_located(turn, "the text behind the turn depends on what it says")
    own_tail = render_around(tokenizer, messages[: turn + 1], turn)[1]
    return start, end + end_of_turn(tokenizer, os.path.commonprefix([tail, own_tail]), last=False)


def tool_calls_end(tokenizer: PreTrainedTokenizerBase, rest: str, closed: str, turn: int) -> int:
    """Characters of `rest`, which starts at a turn with tool calls, through the token that ends that turn.

    `closed` is the same turn as the conversation's last: how it ends is the same in both, how it starts may not be
    (Qwen3 opens only the last turn with a think block).
    """
    same = next((closed[i:] for i in range(len(closed)) if rest.startswith(closed[i:])), "")
    length = end_of_turn(tokenizer, same, last=True)
    if not length:
        raise not_located(turn, "a turn with tool calls is written differently once the conversation goes on")
    return length


def render_around(tokenizer: PreTrainedTokenizerBase, messages: list[Message], turn: int) -> tuple[str, str]:
    """What the template writes before and after the text of message number `turn`."""
    marked = [*messages[:turn], {**messages[turn], "content": MARKER}, *messages[turn + 1 :]]
    parts = render(tokenizer, marked).split(MARKER)
    if len(parts) != 2:
        raise not_located(turn, f"its text appears {len(parts) - 1} times")
    return parts[0], parts[1]


def not_located(turn: int, reason: str) -> ValueError:
    return ValueError(
        f"the chat template does not show what the assistant wrote in message {turn + 1}: {reason}. Put "
        "{% generation %} and {% endgeneration %} around the assistant's text in the template"
    )


def end_of_turn(tokenizer: PreTrainedTokenizerBase, tail: str, last: bool) -> int:
    """Characters of `tail` through its first (or `last`) special token, which ends the turn; 0 without one."""
    ends = [match.end() for match in control_tokens(tokenizer).finditer(tail)]
    if not ends:
        warn_of_endless_turns(tokenizer)
        return len(tail.rstrip()) if last else 0
    return ends[-1] if last else ends[0]


@functools.lru_cache(maxsize=8)
def control_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches the tokens that the tokenizer keeps whole, white space (Gemma has such tokens) left out."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
    longest_first = sorted((token for token in added if token.strip()), key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)))


@functools.lru_cache(maxsize=8)  # once per tokenizer
def warn_of_endless_turns(tokenizer: PreTrainedTokenizerBase) -> None:
    logger.warning(
        "the chat template of %r writes no special token behind an assistant turn: the student cannot learn to stop, "
        "and a rollout ends only after max_new_tokens",
        tokenizer.name_or_path,
    )


def mark_tokens(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: list[tuple[int, int]]
) -> tuple[list[int], list[bool]]:
    """Token ids of `text`, and which of them lie in one of the character `spans` (see `encode_conversation`)."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    mask, previous_end = [], 0
    for start, end in encoded["offset_mapping"]:
        start = min(start, previous_end)  # some byte-level tokenizers leave leading spaces out of the offsets
        previous_end = max(previous_end, end)
        mask.append(any(is_inside(text, start, end, span) for span in spans))
    return encoded["input_ids"], mask


def is_inside(text: str, start: int, end: int, span: tuple[int, int]) -> bool:
    inner_start, inner_end = max(start, span[0]), min(end, span[1])
    if inner_start >= inner_end:
        return False
    return (inner_start, inner_end) == (start, end) or bool(text[inner_start:inner_end].strip())


def stop_token_ids(
    tokenizer: PreTrainedTokenizerBase, generation_config_eos: int | list[int] | None = None
) -> list[int]:
    """Ids that end a generated completion, sorted: eos of tokenizer and generation config, and the template's own.

    The template's end of turn is found by rendering an exchange: a base model's eos is often not the token with
    which its chat template ends a turn.
    """
    stops = {tokenizer.eos_token_id}
    if generation_config_eos is not None:
        stops |= {generation_config_eos} if isinstance(generation_config_eos, int) else set(generation_config_eos)
    exchange = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    _, input_ids, response_mask = encode_conversation(tokenizer, exchange)
    last_id = [i for i, is_response in zip(input_ids, response_mask, strict=True) if is_response][-1]
    if control_tokens(tokenizer).fullmatch(tokenizer.convert_ids_to_tokens(last_id)):
        stops.add(last_id)
    return sorted(stops)
