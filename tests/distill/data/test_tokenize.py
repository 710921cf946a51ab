"""Examples to token ids: templates, end tokens, length limits."""

import pytest

from distill.data import (
    CannotEncode,
    Example,
    TokenSequence,
    TooLong,
    bpe_tokenizer,
    char_tokenizer,
    encode_example,
    encode_examples,
    encode_prompt,
    encode_response,
)

pytestmark = pytest.mark.unit

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def example(prompt="1+1=\n", reference="2\n#2"):
    return Example("gsm8k/train/17", prompt, reference, "2")


@pytest.fixture(scope="module")
def tokenizer():
    return char_tokenizer("0123456789+-=\n#[]abcdefghijklmnopqrstuvwxyz ")


def test_prompt_and_response_meet_at_the_boundary(tokenizer):
    sequence = encode_example(tokenizer, example(), max_length=100)
    assert tokenizer.decode(sequence.ids[: sequence.prompt_length]) == "1+1=\n"
    assert tokenizer.decode(sequence.ids[sequence.prompt_length :]) == "2\n#2<eos>"
    assert sequence.example_id == "gsm8k/train/17"


def test_ids_of_the_prompt_do_not_depend_on_the_response():
    """Merges across the boundary ("a" + "b" → "ab") would train on ids that generation never produces."""
    tokenizer = bpe_tokenizer(["ab ab ab ab"] * 10, 300)
    sequence = encode_example(tokenizer, example("xa", "b"), 10)
    assert sequence.ids == [*tokenizer("xa")["input_ids"], *tokenizer("b")["input_ids"], tokenizer.eos_token_id]
    assert len(sequence.ids) > len(tokenizer("xab")["input_ids"]) + 1


def test_chat_messages_go_through_the_template(tokenizer):
    chat = example([{"role": "system", "content": "short"}, {"role": "user", "content": "1+1"}])
    with pytest.raises(CannotEncode, match="gsm8k/train/17 is a chat"):
        encode_prompt(tokenizer, chat)
    tokenizer.chat_template = TEMPLATE
    try:
        assert tokenizer.decode(encode_prompt(tokenizer, chat)) == "[system]short[user]1+1[assistant]"
    finally:
        tokenizer.chat_template = None


def test_one_end_token_whether_the_text_has_one_or_not(tokenizer):
    ids = encode_response(tokenizer, "2")
    assert ids == [*tokenizer("2")["input_ids"], tokenizer.eos_token_id]
    assert encode_response(tokenizer, "2<eos>") == ids
    assert encode_response(tokenizer, "") == [tokenizer.eos_token_id]


def test_special_tokens_of_the_tokenizer_itself():
    """A tokenizer that opens and closes every text (Llama's opens, some close): opened prompt, nothing else."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = char_tokenizer("ab^")
    bos, eos = tokenizer.convert_tokens_to_ids("^"), tokenizer.eos_token_id
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="^ $A <eos>", special_tokens=[("^", bos), ("<eos>", eos)]
    )
    a, b = tokenizer.convert_tokens_to_ids(["a", "b"])
    assert encode_prompt(tokenizer, example("a")) == [bos, a]
    assert encode_response(tokenizer, "b") == [b, eos]


def test_no_end_token_no_training():
    tokenizer = char_tokenizer("ab")
    tokenizer.eos_token = None
    with pytest.raises(CannotEncode, match="no end-of-text token"):
        encode_response(tokenizer, "a")


def test_unknown_characters_and_missing_references_are_named(tokenizer):
    with pytest.raises(CannotEncode, match=r"gsm8k/train/17.*'Xé'"):
        encode_prompt(tokenizer, example("1Xé1"))
    with pytest.raises(CannotEncode, match="no reference"):
        encode_example(tokenizer, example(reference=None), 10)
    with pytest.raises(CannotEncode, match="no tokens"):
        encode_prompt(tokenizer, example(""))


def test_length_limits(tokenizer):
    whole = encode_example(tokenizer, example(), 10)  # 5 + 4 + end = 10: exactly fits
    assert len(whole.ids) == 10
    with pytest.raises(TooLong, match=r"gsm8k/train/17: prompt and response have 10 tokens, the limit is 9"):
        encode_example(tokenizer, example(), 9)
    cut = encode_example(tokenizer, example(), 8, "truncate")
    assert cut.ids == whole.ids[:8]
    assert tokenizer.eos_token_id not in cut.ids
    for policy in ("error", "truncate", "skip"):
        with pytest.raises(TooLong, match="prompt alone has 5 tokens, the limit is 5"):
            encode_example(tokenizer, example(), 5, policy)


def test_skipping_counts(tokenizer):
    examples = [example(), example("1+1+1+1+1=\n"), example("1=")]
    sequences, skipped = encode_examples(tokenizer, examples, 10, "skip")
    assert [s.prompt_length for s in sequences] == [5, 2]
    assert [(e.length, e.limit) for e in skipped] == [(11, 10)]
    with pytest.raises(TooLong):
        encode_examples(tokenizer, examples, 10, "error")


def test_a_sequence_keeps_its_columns_in_step():
    sequence = TokenSequence([1, 2, 3, 4, 5], 2, "a", [True, False, True], [-1.0, -2.0, -3.0], teacher_prompt=[9])
    cut = sequence.truncated(2)
    assert (cut.ids, cut.supervised, cut.logprobs) == ([1, 2, 3, 4], [True, False], [-1.0, -2.0])
    assert TokenSequence([1, 2, 3], 1, "a").truncated(9).ids == [1, 2, 3]
    seen = sequence.before_teacher()
    assert (seen.ids, seen.prompt_length, seen.supervised) == ([9, 3, 4, 5], 1, [True, False, True])
    assert seen.before_teacher() is seen
    with pytest.raises(ValueError, match="example a: 2 supervised for 3 response tokens"):
        TokenSequence([1, 2, 3, 4, 5], 2, "a", [True, False])
    with pytest.raises(ValueError, match="example a: 1 logprobs for 3 response tokens"):
        TokenSequence([1, 2, 3, 4, 5], 2, "a", None, [-1.0])
