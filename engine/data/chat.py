"""From messages to token ids: chat templates and the response mask.

The response mask marks the tokens that the assistant writes and must learn to write: its text, its reasoning and tool
calls, and the token that ends its turn, in every turn alike; never a header, an empty think block or anything else that
the template puts around it. It is built from character positions in the rendered conversation (`engine.data.template`),
never by comparing ids, so that a pad token equal to eos hides nothing. A template with `{% generation %}` may leave
parts of turns out of it. Whatever cannot be found raises; nothing is guessed.

A conversation begins with the prompt that a rollout of its last turn would start from. Only a think block that the
generation prompt opens may differ: a template may not write it around an answer that has none.

Nothing here knows of models, ranks or datasets. No collectives. Tokenizers must have passed
`engine.data.tokenizer.prepare_tokenizer`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from engine.data.completeness import require_tools, room_of, with_function_calls
from engine.data.marks import Message, Rendering, Span
from engine.data.template import NO_INPUT, ChatTemplate, TemplateInput
from engine.data.turns import Located, locate


class Encoded(NamedTuple):
    """Token ids of a sequence with the response tokens marked, and of the prompt that a rollout starts from."""

    prompt_ids: list[int]
    input_ids: list[int]
    response_mask: list[bool]


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    responses: Collection[int] | None = None,
    *,
    max_length: int | None = None,
    template: TemplateInput = NO_INPUT,
    notes: Counter[str] | None = None,
) -> Encoded | None:
    """Token ids of a conversation, with the assistant's tokens marked.

    `prompt_ids` is the conversation up to its last assistant turn, with the generation prompt. A conversation that
    does not end in a response is a prompt: `input_ids == prompt_ids` and nothing is marked. At most six renderings,
    whatever the number of turns.

    A token that joins template and assistant text (a header's last space and the first word) is marked if its
    assistant part is more than white space.

    Args:
        responses: numbers of the assistant messages to mark; by default all.
        max_length: longest result in tokens. What does not fit loses its last turns, then the end of its completion.
        notes: counts what a user should know of a row that can be used.

    Returns:
        None where `max_length` leaves no room for a response, or behind a prompt.

    Raises:
        ValueError: where template or tokenizer refuse the conversation, the template leaves out what the assistant
            says, or its rendering does not show where a turn is.
    """
    chat = ChatTemplate(tokenizer, template)
    notes = Counter() if notes is None else notes
    messages = [with_function_calls(message, number) for number, message in enumerate(messages)]
    turns = [
        number
        for number, message in enumerate(messages)
        if message["role"] == "assistant" and (responses is None or number in responses)
    ]
    if not turns or turns[-1] != len(messages) - 1:
        text = chat.render(messages, prompt=True).text
        require_tools(chat, text)
        prompt_ids = tokenise(tokenizer, text)
        has_room = max_length is None or len(prompt_ids) < max_length
        return Encoded(prompt_ids, list(prompt_ids), [False] * len(prompt_ids)) if has_room else None
    plain = chat.render(messages)
    require_tools(chat, plain.text)
    turns = turns_that_begin_within(chat, messages, turns, plain, max_length)
    while turns:
        end, own_notes = turns[-1] + 1, Counter[str]()
        located = locate(chat, messages[:end], turns, plain if end == len(messages) else None, own_notes)
        encoded = encode_located(tokenizer, located)
        if max_length is None or len(encoded.prompt_ids) < max_length and any(encoded.response_mask[:max_length]):
            notes.update(own_notes)
            return Encoded(encoded.prompt_ids, encoded.input_ids[:max_length], encoded.response_mask[:max_length])
        turns = turns[:-1]
    return None


def turns_that_begin_within(
    chat: ChatTemplate, messages: list[Message], turns: list[int], plain: Rendering, max_length: int | None
) -> list[int]:
    """The turns that begin before `max_length` tokens of the conversation are over."""
    if max_length is None or len(plain.text.encode(errors="replace")) <= max_length:  # a token is one byte or more
        return turns
    _, offsets = tokenise_with_offsets(chat.tokenizer, plain.text)
    if len(offsets) <= max_length:
        return turns
    end, marked = offsets[max_length - 1][1], chat.render_marked(messages)
    # a turn without a text is a call behind the header that follows the message before it
    starts = [
        marked.by_message[t][0][0][0] if t in marked.by_message else room_of(messages, marked, t)[0] for t in turns
    ]
    return [turn for turn, start in zip(turns, starts, strict=True) if start < end]


def encode_located(tokenizer: PreTrainedTokenizerBase, located: Located) -> Encoded:
    input_ids, response_mask = mark_tokens(tokenizer, located.text, located.spans)
    return Encoded(tokenise(tokenizer, located.prompt), input_ids, response_mask)


def encode_prompt_completion(
    tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str | None, *, max_length: int | None = None
) -> Encoded | None:
    """Token ids of a plain text and its completion, without a template; None is a prompt alone.

    The text gets bos where the tokenizer writes one, and eos behind the completion. Prompt and completion are
    tokenised together; a token that joins them counts as completion.

    Returns:
        None where `max_length` leaves no room behind the prompt.

    Raises:
        ValueError: for a text that the tokenizer refuses.
    """
    bos = begin_of_text(tokenizer)
    prompt_ids = bos + tokenise(tokenizer, prompt)
    if max_length is not None and len(prompt_ids) >= max_length:
        return None
    if completion is None:
        return Encoded(prompt_ids, list(prompt_ids), [False] * len(prompt_ids))
    text = prompt + completion
    input_ids, response_mask = mark_tokens(tokenizer, text, [(len(prompt), len(text))])
    if input_ids[-1] != tokenizer.eos_token_id:
        input_ids, response_mask = input_ids + [tokenizer.eos_token_id], response_mask + [True]
    input_ids, response_mask = bos + input_ids, [False] * len(bos) + response_mask
    if not any(response_mask[:max_length]):
        return None
    return Encoded(prompt_ids, input_ids[:max_length], response_mask[:max_length])


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a whole text, between bos, where the tokenizer writes one, and eos."""
    input_ids = begin_of_text(tokenizer) + tokenise(tokenizer, text)
    return input_ids if input_ids[-1:] == [tokenizer.eos_token_id] else [*input_ids, tokenizer.eos_token_id]


def begin_of_text(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The bos id where the tokenizer writes one before a text of its own accord."""
    first = tokenizer("a", verbose=False)["input_ids"][:1]
    bare = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] and bare != first else []


def tokenise(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text as it stands; ValueError where the tokenizer refuses it."""
    return tokenise_with_offsets(tokenizer, text)[0]


def tokenise_with_offsets(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[Span]]:
    """As `tokenise`, with the characters that each token stands for."""
    try:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    except (TypeError, UnicodeError) as error:  # `tokenizers` cannot take half of a surrogate pair
        raise ValueError(f"the tokenizer refuses the text: {error}") from error
    return encoded["input_ids"], encoded["offset_mapping"]


def mark_tokens(tokenizer: PreTrainedTokenizerBase, text: str, spans: list[Span]) -> tuple[list[int], list[bool]]:
    """Token ids of `text`, and which of them lie in one of the character `spans`, which are in order.

    A token that sticks out of a span is marked if its part inside is more than white space.
    """
    ids, offsets = tokenise_with_offsets(tokenizer, text)
    mask: list[bool] = []
    previous_end = number = 0
    for start, end in offsets:
        start = min(start, previous_end)  # some byte-level tokenizers leave leading spaces out of the offsets
        previous_end = max(previous_end, end)
        while number < len(spans) and spans[number][1] <= start:
            number += 1
        if number == len(spans) or end <= spans[number][0]:
            mask.append(False)
        elif spans[number][0] <= start and end <= spans[number][1]:
            mask.append(start < end)
        else:
            mask.append(any(sticks_out_with_text(text, start, end, span) for span in spans[number : number + 2]))
    return ids, mask


def sticks_out_with_text(text: str, start: int, end: int, span: Span) -> bool:
    return bool(text[max(start, span[0]) : min(end, span[1])].strip())


def stop_token_ids(
    tokenizer: PreTrainedTokenizerBase,
    generation_config_eos: int | list[int] | None = None,
    template: TemplateInput = NO_INPUT,
) -> list[int]:
    """Ids that end a generated completion, sorted: eos of tokenizer and generation config, and the template's own.

    A base model's eos is often not the token with which its chat template ends a turn; and a turn with a tool call may
    end in another than one with an answer.
    """
    stops = {tokenizer.eos_token_id}
    if generation_config_eos is not None:
        stops |= {generation_config_eos} if isinstance(generation_config_eos, int) else set(generation_config_eos)
    return sorted(stops | set(tokenizer.convert_tokens_to_ids(list(ChatTemplate(tokenizer, template).shape.stops))))


def uses_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template writes today's date."""
    return "strftime_now" in ChatTemplate(tokenizer).source
