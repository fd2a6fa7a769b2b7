"""Loading a tokenizer, of either kind, so that the rest of the engine may rely on it.

A Hugging Face folder or hub name goes through `AutoTokenizer`. A SentencePiece model (a bare `*.model` file, or
a folder that has `tokenizer.model` and no `tokenizer.json`) is converted here: transformers 5 orders the BPE
merges of such a file by vocabulary index instead of by score, which gives other ids than SentencePiece does
wherever there are two spaces in a row. Every conversion is compared with SentencePiece itself before it is used.

Nothing here knows of models, ranks or datasets. No collectives.
"""

from __future__ import annotations

import copy
import logging
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import try_to_load_from_cache
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast, ProcessorMixin

logger = logging.getLogger(__name__)

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")

# "System: ...\nUser: ...\nAssistant: ...<eos>\n": plain words, since a base vocabulary has no role tokens.
DEFAULT_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] | trim }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)

# Piece types of sentencepiece_model.proto.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
UNIGRAM, BPE = 1, 2

PROBE = (
    "a\nTwo  spaces,   three;\ttab. 12345 + 6.7e-8 = \u00e9\u00f1 \u4f60\u597d \U0001d11e\n\n"
    "def f(x):\n        return [x  for y in 'z']  # don't\n<p>It isn't http://x.org/?q=1</p> supercalifragilistic"
)


class TokenizerChanges(NamedTuple):
    """What the configuration has otherwise than the tokenizer; None leaves that as it is.

    Attributes:
        chat_template_path: a Jinja file, or the folder or hub name of a tokenizer that has a template.
        eos_token, pad_token: tokens of the vocabulary.
    """

    chat_template_path: str | None = None
    eos_token: str | None = None
    pad_token: str | None = None


NO_CHANGES = TokenizerChanges()


def load_tokenizer(
    path_or_name: str,
    trust_remote_code: bool = False,
    revision: str | None = None,
    changes: TokenizerChanges = NO_CHANGES,
) -> PreTrainedTokenizerBase:
    """The tokenizer of a hub name (of a revision), a Hugging Face folder, a SentencePiece file or a folder with one.

    Raises:
        ValueError: where it cannot be loaded, has no eos token, or is not a `tokenizers`-backed (fast) one.
    """
    path = Path(path_or_name)
    model_file = find_sentencepiece_file(path)
    if model_file is not None and not (path / "tokenizer_config.json").is_file():
        return prepare_tokenizer(tokenizer_from_sentencepiece(model_file), changes)
    at = {} if revision is None else {"revision": revision}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path_or_name, trust_remote_code=trust_remote_code, **at)
    except Exception as error:  # the Rust side of `tokenizers` raises plain Exception for a broken file
        raise ValueError(
            f"no tokenizer could be loaded from {path_or_name!r} ({type(error).__name__}: {error}). Give a hub name, "
            "a folder with tokenizer.json or tokenizer.model, or a SentencePiece .model file"
        ) from error
    if model_file is not None and tokenizer.is_fast:
        proto = read_sentencepiece(model_file)
        if proto.trainer_spec.model_type == BPE:
            tokenizer.backend_tokenizer.model = build_bpe(proto)
        check_against_sentencepiece(tokenizer.backend_tokenizer, model_file)
    return prepare_tokenizer(tokenizer, changes)


def load_tokenizer_at_hand(path_or_name: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a local folder, or of a hub name that this host's cache holds; None where there is none."""
    is_cached = any(
        isinstance(try_to_load_from_cache(path_or_name, file), str)
        for file in ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")
        if HUB_NAME.fullmatch(path_or_name)
    )
    if not is_cached and not Path(path_or_name or os.devnull).is_dir():
        return None
    try:
        return load_tokenizer(path_or_name, trust_remote_code)
    except ValueError:
        return None


def plain_tokenizer(processing_class: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a multimodal processor; any other object is one itself."""
    return processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class


def prepare_tokenizer(
    tokenizer: PreTrainedTokenizerBase, changes: TokenizerChanges = NO_CHANGES
) -> PreTrainedTokenizerBase:
    """Check a tokenizer and fill in, in place, what it lacks: the pad token (eos) and the chat template.

    With `changes`, that is done to a copy which has them.

    Padding with eos is safe: response masks are built by position, never by comparing ids with the pad id.

    Raises:
        ValueError: without an eos token, for a tokenizer without character offsets (not a fast one), or for changes
            that cannot be made.
    """
    tokenizer = changed(tokenizer, changes)
    name = tokenizer.name_or_path or type(tokenizer).__name__
    if not tokenizer.is_fast:
        raise ValueError(
            f"tokenizer {name!r} ({type(tokenizer).__name__}) is not a fast tokenizer; the response mask needs its "
            "character offsets. Convert it to a tokenizer.json first"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer {name!r} has no eos token, so a completion could never end: set `eos_token`")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None:
        logger.warning(
            "tokenizer %r has no chat template: using the engine's plain default ('User: ...', 'Assistant: ...<eos>'; "
            "engine.data.tokenizer.DEFAULT_CHAT_TEMPLATE). Set tokenizer.chat_template to use another",
            name,
        )
        tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
    return tokenizer


def changed(tokenizer: PreTrainedTokenizerBase, changes: TokenizerChanges) -> PreTrainedTokenizerBase:
    """A copy with the changes; the tokenizer itself where there are none."""
    if changes == NO_CHANGES:
        return tokenizer
    made = copy.deepcopy(tokenizer)
    for name, token in (("eos_token", changes.eos_token), ("pad_token", changes.pad_token)):
        if token is not None:
            if token not in tokenizer.get_vocab():
                raise ValueError(f"{name}={token!r} is not a token of the student's tokenizer")
            setattr(made, name, token)
    if changes.chat_template_path is not None:
        made.chat_template = read_chat_template(changes.chat_template_path)
    return made


def read_chat_template(path_or_name: str) -> str | dict[str, str]:
    """The text of a Jinja file, or the template of a tokenizer; ValueError where there is none."""
    if Path(path_or_name).is_file():
        return Path(path_or_name).read_text(encoding="utf-8")
    try:
        template = AutoTokenizer.from_pretrained(path_or_name).chat_template
    except Exception as error:  # as in `load_tokenizer`
        raise ValueError(
            f"chat_template_path={path_or_name!r}: neither a file nor a tokenizer's folder or hub name "
            f"({type(error).__name__}: {error})"
        ) from error
    if template is None:
        raise ValueError(f"chat_template_path={path_or_name!r}: that tokenizer has no chat template")
    return template


def find_sentencepiece_file(path: Path) -> Path | None:
    """The SentencePiece file that `path` is or, for a folder without tokenizer.json, holds; None without one."""
    if path.is_file():
        return path
    if not path.is_dir() or (path / "tokenizer.json").is_file():
        return None
    if (path / "tokenizer.model").is_file():
        return path / "tokenizer.model"
    if (path / "tokenizer_config.json").is_file():
        return None  # some other kind; its own class knows which file to read
    found = sorted(file for file in path.glob("*.model*") if file.is_file())
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise ValueError(f"{str(path)!r} holds several SentencePiece files ({names}): give the path of one of them")
    return found[0] if found else None


def tokenizer_from_sentencepiece(file: Path) -> PreTrainedTokenizerFast:
    """A fast tokenizer that gives the ids of the SentencePiece model in `file`.

    It writes bos in front of plain text where the model has a bos piece, as Llama's and Mistral's do, and like
    theirs adds no second space to a text that starts with one.

    Raises:
        ValueError: where the file is no SentencePiece model, or one that `tokenizers` cannot express.
    """
    proto = read_sentencepiece(file)
    spec, normalizer_spec = proto.trainer_spec, proto.normalizer_spec
    backend = Tokenizer(build_bpe(proto) if spec.model_type == BPE else build_unigram(proto, file))
    steps: list[normalizers.Normalizer] = []
    if normalizer_spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(normalizer_spec.precompiled_charsmap))
    if normalizer_spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if steps:
        backend.normalizer = normalizers.Sequence(steps)
    scheme = "first" if normalizer_spec.add_dummy_prefix else "never"
    backend.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", prepend_scheme=scheme, split=spec.model_type != BPE)
    decoding = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if normalizer_spec.add_dummy_prefix:
        decoding.append(decoders.Strip(content=" ", left=1))
    backend.decoder = decoders.Sequence(decoding)
    for piece in proto.pieces:
        if piece.type in (CONTROL, USER_DEFINED):
            backend.add_tokens([AddedToken(piece.piece, normalized=False, special=piece.type == CONTROL)])
    roles = {"bos_token": spec.bos_id, "eos_token": spec.eos_id, "unk_token": spec.unk_id, "pad_token": spec.pad_id}
    names = {role: proto.pieces[token_id].piece for role, token_id in roles.items() if token_id >= 0}
    if "bos_token" in names:
        bos = names["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, spec.bos_id)]
        )
    check_against_sentencepiece(backend, file)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, name_or_path=str(file), clean_up_tokenization_spaces=False, **names
    )


def read_sentencepiece(file: Path):
    """The parsed `ModelProto` of a SentencePiece file; ValueError where it is something else."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(file.read_bytes())
    except DecodeError as error:
        raise ValueError(f"{str(file)!r} is not a SentencePiece model ({error})") from error
    if not proto.pieces or proto.trainer_spec.model_type not in (UNIGRAM, BPE):
        raise ValueError(f"{str(file)!r} is not a SentencePiece model of type unigram or BPE")
    return proto


def build_bpe(proto) -> models.BPE:
    """BPE with SentencePiece's rule as merges: join the pair whose joined piece has the highest score."""
    ids = {piece.piece: token_id for token_id, piece in enumerate(proto.pieces)}
    merges = []
    for token_id, piece in enumerate(proto.pieces):
        if piece.type != NORMAL:
            continue
        for cut in range(1, len(piece.piece)):
            left, right = piece.piece[:cut], piece.piece[cut:]
            if left in ids and right in ids:
                merges.append((-piece.score, token_id, cut, left, right))
    merges.sort()
    pairs = [(left, right) for *_, left, right in merges]
    spec = proto.trainer_spec
    unknown = proto.pieces[spec.unk_id].piece
    return models.BPE(ids, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=spec.byte_fallback)


def build_unigram(proto, file: Path) -> models.Unigram:
    unknown = [token_id for token_id, piece in enumerate(proto.pieces) if piece.type == UNKNOWN]
    if not unknown:
        raise ValueError(f"{str(file)!r} has no unknown piece")
    vocabulary = [(piece.piece, piece.score) for piece in proto.pieces]
    return models.Unigram(vocabulary, unk_id=unknown[0], byte_fallback=proto.trainer_spec.byte_fallback)


def check_against_sentencepiece(backend: Tokenizer, file: Path) -> None:
    """Raise ValueError where the converted tokenizer and SentencePiece give different ids for the probe text.

    Both are compared after the probe's first word, as classes differ in whether a text starts with a space.
    """
    from sentencepiece import SentencePieceProcessor

    reference = SentencePieceProcessor(model_file=str(file))
    expected = reference.encode(PROBE)
    converted = backend.encode(PROBE, add_special_tokens=False).ids
    first_word = len(reference.encode(PROBE[0]))
    skip = len(backend.encode(PROBE[0], add_special_tokens=False).ids)
    if converted[skip:] != expected[first_word:]:
        pieces = [reference.id_to_piece(i) for i in expected[first_word:]]
        tokens = [backend.id_to_token(i) for i in converted[skip:]]
        place = len(os.path.commonprefix([pieces, tokens]))
        raise ValueError(
            f"{str(file)!r} cannot be used: the converted tokenizer differs from SentencePiece at piece {place} of a "
            f"probe text ({tokens[place : place + 3]} for {pieces[place : place + 3]}). Give a tokenizer.json instead"
        )
