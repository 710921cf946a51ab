"""From text to token ids: prompts, responses, and whole examples with a length limit.

A chat prompt goes through the tokenizer's chat template with the mark that opens the assistant's turn; a response is
its own text and one end token. Prompt and response are encoded apart, so that the ids a model is trained on are the
ids it will see when it generates: the boundary never depends on what follows it.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from transformers import PreTrainedTokenizerBase

from distill.data.example import Example, Message, Prompt

OnLong = Literal["error", "truncate", "skip"]


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """Token ids of a prompt and its response, and what is known of how the response came about.

    Attributes:
        supervised: which response tokens a loss looks at, one flag each; None: all of ``ids[prompt_length:]``.
        logprobs: of each response token when a model wrote it (nats, temperature 1); None for text from elsewhere.
        sample: global sample number.
        correct: a verifier's verdict of a text written for this step (1 or 0); None: not judged.
        teacher_prompt: prompt ids that the teacher sees before the same response; None: the same prompt.
        tag: which teacher's sample it is (``teacher.route``); None where there is one teacher.
        prompt: the prompt that the teacher is to read, as text or messages: for a teacher with a tokenizer of its own.
        notes: figures of how the text was made, averaged over the step's sequences that have them (metric ``sample/NAME``).
    """

    ids: list[int]
    prompt_length: int
    example_id: str
    supervised: list[bool] | None = None
    logprobs: list[float] | None = None
    sample: int = 0
    correct: float | None = None
    teacher_prompt: list[int] | None = None
    tag: str | None = None
    prompt: Prompt | None = None
    notes: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        count = len(self.ids) - self.prompt_length
        for name, values in (("supervised", self.supervised), ("logprobs", self.logprobs)):
            if values is not None and len(values) != count:
                raise ValueError(f"example {self.example_id}: {len(values)} {name} for {count} response tokens")

    @property
    def response_ids(self) -> list[int]:
        return self.ids[self.prompt_length :]

    def truncated(self, count: int) -> "TokenSequence":
        """The same with the first ``count`` response tokens only."""
        flags = None if self.supervised is None else self.supervised[:count]
        logprobs = None if self.logprobs is None else self.logprobs[:count]
        return replace(self, ids=self.ids[: self.prompt_length + count], supervised=flags, logprobs=logprobs)

    def before_teacher(self) -> "TokenSequence":
        """As the teacher sees it: its own prompt, where it has one, before the same response."""
        if self.teacher_prompt is None:
            return self
        ids = [*self.teacher_prompt, *self.response_ids]
        return replace(self, ids=ids, prompt_length=len(self.teacher_prompt), teacher_prompt=None)


class TooLong(ValueError):
    """A sample exceeds the length limit."""

    def __init__(self, example_id: str, what: str, length: int, limit: int, remedy: str) -> None:
        super().__init__(f"example {example_id}: {what} {length} tokens, the limit is {limit}; {remedy}")
        self.example_id, self.length, self.limit = example_id, length, limit


class CannotEncode(ValueError):
    """The tokenizer cannot represent a sample."""


def encode_prompt(tokenizer: PreTrainedTokenizerBase, example: Example) -> list[int]:
    """Ids of the prompt, ready for generation.

    Plain text gets the beginning-of-text token where the tokenizer adds one, never an end token. Messages go through
    the chat template (which writes its own special tokens).
    Raises CannotEncode where there is no template, a character is unknown or nothing is left to encode.
    """
    if isinstance(example.prompt, str):
        ids = _encode(tokenizer, example.prompt, example.id, special=True)
        while ids and ids[-1] == tokenizer.eos_token_id:  # some tokenizers close every text
            ids.pop()
    else:
        ids = _encode(tokenizer, _chat_text(tokenizer, example.prompt, example.id), example.id, special=False)
    if not ids:
        raise CannotEncode(f"example {example.id}: its prompt has no tokens")
    return ids


def encode_response(tokenizer: PreTrainedTokenizerBase, text: str, example_id: str = "?") -> list[int]:
    """Ids of ``text`` and one end token (none is added where the text ends with it), no other special tokens."""
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise CannotEncode("the tokenizer has no end-of-text token, so no model could learn to stop; set its eos_token")
    ids = _encode(tokenizer, text, example_id, special=False)
    return ids if ids and ids[-1] == end else [*ids, end]


def encode_example(
    tokenizer: PreTrainedTokenizerBase, example: Example, max_length: int, on_long: OnLong = "error"
) -> TokenSequence:
    """Prompt and reference of ``example`` in at most ``max_length`` tokens.

    With ``on_long="truncate"`` an over-long response loses its end (and its end token with it: a model must not learn
    to stop in mid-sentence). Otherwise, and always where the prompt alone fills the limit, an over-long sample raises
    TooLong; ``encode_examples`` turns that into skipping.

    Raises:
        TooLong: names the example, its length and the limit.
        CannotEncode: no reference, no chat template, or characters the tokenizer does not know.
    """
    whole = _whole(tokenizer, example)
    length, count = len(whole.ids), whole.prompt_length
    if count >= max_length:
        remedy = "shorten the prompt, raise the limit, or set data.on_long=skip"
        raise TooLong(example.id, "its prompt alone has", count, max_length, remedy)
    if length > max_length and on_long != "truncate":
        remedy = "raise the limit, or set data.on_long to truncate or skip"
        raise TooLong(example.id, "prompt and response have", length, max_length, remedy)
    return whole.truncated(max_length - count)


def _whole(tokenizer: PreTrainedTokenizerBase, example: Example) -> TokenSequence:
    """Prompt and reference, however long; from their exact tokens where the example has them."""
    exact = example.exact
    if exact is not None:
        if max(exact.ids) >= len(tokenizer):
            raise CannotEncode(
                f"example {example.id}: token id {max(exact.ids)} is beyond the tokenizer's {len(tokenizer)}: the record is of "
                "another tokenizer; set data.ids_key=null to encode its text anew"
            )
        return TokenSequence(exact.ids, exact.prompt_length, example.id, exact.supervised)
    if example.reference is None:
        raise CannotEncode(
            f"example {example.id} has no reference response to train on: this method needs one (or rollouts)"
        )
    prompt = encode_prompt(tokenizer, example)
    ids = prompt + encode_response(tokenizer, example.reference, example.id)
    return TokenSequence(ids, len(prompt), example.id)


def encode_examples(
    tokenizer: PreTrainedTokenizerBase, examples: list[Example], max_length: int, on_long: OnLong = "error"
) -> tuple[list[TokenSequence], list[TooLong]]:
    """Encode several examples; with ``on_long="skip"`` the over-long ones come back apart, to be counted."""
    sequences, skipped = [], []
    for example in examples:
        try:
            sequences.append(encode_example(tokenizer, example, max_length, on_long))
        except TooLong as error:
            if on_long != "skip":
                raise
            skipped.append(error)
    return sequences, skipped


def _chat_text(tokenizer: PreTrainedTokenizerBase, messages: list[Message], example_id: str) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise CannotEncode(
            f"example {example_id} is a chat, and this tokenizer has no chat template: use the tokenizer of an "
            "instruction-tuned model, set its chat_template, or give the data as prompt and response"
        )
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return str(text)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, example_id: str, special: bool) -> list[int]:
    try:
        return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
    except Exception as error:  # the tokenizers library raises bare Exception for an unknown symbol
        unknown = "".join(sorted({character for character in text if character not in tokenizer.get_vocab()}))[:40]
        raise CannotEncode(
            f"example {example_id}: the tokenizer cannot encode {text[:80]!r} "
            f"({error}; characters that are not tokens: {unknown!r})"
        ) from error
