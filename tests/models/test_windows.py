"""Laws of the windows that a text is cut into, for the three tasks."""

import hf_folders
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fisherfunc.models.huggingface import num_valid_tokens, text_batches, text_windows

IGNORED = -100
WEIGHTS = "model.safetensors"


TOKENIZERS: dict[str, object] = {}


def _windows(kind: str, text: str, **options):
    tokenizer = TOKENIZERS.setdefault(kind, hf_folders.tokenizer(kind))
    return tokenizer, text_batches(tokenizer, text, task=hf_folders.TASKS[kind], **options)


def _rows(batches, key):
    return [row for batch in batches for row in batch[key].tolist()]


@given(length=st.integers(2, 60), context=st.integers(2, 20))
def test_causal_windows_are_the_text_cut(length, context):
    text = hf_folders.sentence(length)
    tokenizer, batches = _windows("gpt2", text, context=context)
    rows = _rows(batches, "input_ids")
    ids = tokenizer(text)["input_ids"]
    joined = [token for row in rows for token in row]
    assert joined == ids[: len(joined)]
    assert len(ids) - len(joined) < 2  # a single last token predicts nothing
    assert all(len(row) == context for row in rows[:-1])
    assert len(batches) <= 2
    assert num_valid_tokens(batches) == sum(len(row) - 1 for row in rows)
    assert all(bool((batch["attention_mask"] == 1).all()) for batch in batches)


@given(length=st.integers(1, 60), context=st.integers(3, 20), seed=st.integers(0, 5))
def test_masked_windows_hide_a_share_of_the_text_and_nothing_else(length, context, seed):
    text = hf_folders.sentence(length)
    tokenizer, batches = _windows("bert", text, context=context, seed=seed)
    restored: list[int] = []
    for inputs, labels in zip(_rows(batches, "input_ids"), _rows(batches, "labels"), strict=True):
        hidden = [index for index, label in enumerate(labels) if label != IGNORED]
        assert inputs[0] == tokenizer.cls_token_id
        assert inputs[-1] == tokenizer.sep_token_id
        assert all(inputs[index] == tokenizer.mask_token_id for index in hidden)
        assert inputs.count(tokenizer.mask_token_id) == len(hidden)
        assert len(hidden) == max(1, round(0.15 * (len(inputs) - 2)))
        assert len(inputs) <= context
        restored += [labels[i] if i in hidden else token for i, token in enumerate(inputs)][1:-1]
    assert restored == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_the_seed_chooses_what_is_masked():
    text = hf_folders.sentence(120)
    labels = {seed: _rows(_windows("bert", text, context=20, seed=seed)[1], "labels") for seed in (0, 1)}
    assert labels[0] == _rows(_windows("bert", text, context=20, seed=0)[1], "labels")
    assert labels[0] != labels[1]


@given(length=st.integers(2, 60), context=st.integers(2, 20))
def test_seq2seq_windows_split_in_the_middle(length, context):
    text = hf_folders.sentence(length)
    tokenizer, batches = _windows("t5", text, context=context)
    joined: list[int] = []
    for inputs, labels in zip(_rows(batches, "input_ids"), _rows(batches, "labels"), strict=True):
        assert inputs[-1] == labels[-1] == tokenizer.eos_token_id
        assert len(labels) - len(inputs) in (0, 1)
        joined += inputs[:-1] + labels[:-1]
    assert joined == tokenizer(text, add_special_tokens=False)["input_ids"][: len(joined)]
    assert len(joined) >= length - 1


@pytest.mark.parametrize("kind", hf_folders.TASKS)
@pytest.mark.parametrize("wanted", [1, 7, 20])
def test_no_more_windows_than_needed(kind, wanted):
    _, batches = _windows(kind, hf_folders.sentence(400), context=10, num_tokens=wanted)
    found = num_valid_tokens(batches)
    windows = sum(len(batch["input_ids"]) for batch in batches)
    assert wanted <= found < wanted + found / windows


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_a_text_too_short_says_what_it_has_and_needs(kind):
    with pytest.raises(ValueError, match=r"the text has 1 token\(s\), and \w+ needs 2 for one prediction"):
        _windows(kind, "w1", context=8)


def test_an_empty_text_and_a_small_context_are_errors():
    with pytest.raises(ValueError, match=r"the text has 0 token\(s\), and masked_lm needs 1"):
        _windows("bert", " \n", context=8)
    with pytest.raises(ValueError, match="context=2 leaves no token to predict; masked_lm needs 3"):
        _windows("bert", "w1 w2", context=2)
    with pytest.raises(ValueError, match="context=1 leaves no token to predict; causal_lm needs 2"):
        _windows("gpt2", "w1 w2", context=1)
    with pytest.raises(ValueError, match="task='regression'"):
        text_batches(hf_folders.tokenizer("gpt2"), "w1 w2", task="regression", context=8)


def test_a_masked_model_needs_a_mask_token():
    with pytest.raises(ValueError, match="needs a mask token"):
        text_batches(hf_folders.tokenizer("gpt2"), "w1 w2", task="masked_lm", context=8)


def test_special_tokens_in_the_text_are_not_predicted():
    _, batches = _windows("bert", "[SEP] [SEP] w1 [SEP]", context=10)
    assert _rows(batches, "labels") == [[IGNORED] * 3 + [7] + [IGNORED] * 2]
    with pytest.raises(ValueError, match="masked_lm needs 1"):
        _windows("bert", "[SEP] [SEP]", context=10)


def test_a_long_text_gives_no_warning(recwarn, caplog):
    tokenizer = hf_folders.tokenizer("gpt2")
    tokenizer.model_max_length = 8
    text_batches(tokenizer, hf_folders.sentence(50), task="causal_lm", context=8)
    assert not recwarn.list
    assert not caplog.records


def _with_start(kind="gpt2", start=("[CLS]",)):
    """A tokenizer that begins every text with some tokens, as LLaMA's does."""
    from tokenizers import processors

    tokenizer = hf_folders.tokenizer(kind)
    ids = {word: index for index, word in enumerate(hf_folders.SPECIAL)}
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join([*start, "$A"]), special_tokens=[(word, ids[word]) for word in start]
    )
    tokenizer.bos_token = start[0]
    return tokenizer


def _causal(tokenizer, length, context, **options):
    return text_batches(tokenizer, hf_folders.sentence(length), task="causal_lm", context=context, **options)


@given(length=st.integers(1, 60), context=st.integers(2, 20))
def test_windows_begin_as_the_tokenizer_begins_a_text(length, context):
    tokenizer = TOKENIZERS.setdefault("starts", _with_start())
    for bos in ("auto", "always"):
        batches = _causal(tokenizer, length, context, bos=bos)
        rows = _rows(batches, "input_ids")
        assert all(row[0] == tokenizer.bos_token_id and len(row) <= context for row in rows)
        assert all(len(row) == context for row in rows[:-1])
        ids = tokenizer(hf_folders.sentence(length), add_special_tokens=False)["input_ids"]
        assert [token for row in rows for token in row[1:]] == ids
        assert num_valid_tokens(batches) == length  # the first token of each window is predicted from its start
    assert rows[0][:2] == tokenizer(hf_folders.sentence(length))["input_ids"][:2]


def test_never_and_a_tokenizer_that_begins_with_nothing_leave_the_text_alone():
    starts, plain = _with_start(), hf_folders.tokenizer("gpt2")
    expected = _rows(_causal(plain, 30, 8), "input_ids")
    assert _rows(_causal(starts, 30, 8, bos="never"), "input_ids") == expected
    assert _rows(_causal(plain, 30, 8, bos="auto"), "input_ids") == expected
    plain.bos_token = "[SEP]"  # has one, and does not begin texts with it
    assert _rows(_causal(plain, 30, 8), "input_ids") == expected
    assert {row[0] for row in _rows(_causal(plain, 30, 8, bos="always"), "input_ids")} == {plain.bos_token_id}


def test_of_several_start_tokens_none_is_predicted():
    batches = _causal(_with_start(start=("[CLS]", "[SEP]")), 5, 5)
    assert _rows(batches, "input_ids")[0][:2] == [2, 3]
    assert [row[:2] for row in _rows(batches, "labels")] == [[IGNORED, IGNORED]] * 2
    assert num_valid_tokens(batches) == 5


def test_a_start_token_that_there_is_not_is_an_error():
    with pytest.raises(ValueError, match=r"bos='always' needs a start token, and this tokenizer has none.*bos='auto'"):
        _causal(hf_folders.tokenizer("gpt2"), 9, 4, bos="always")
    with pytest.raises(ValueError, match="bos='never' is of causal models; windows of a masked_lm model"):
        _windows("bert", "w1 w2 w3", context=8, bos="never")
    with pytest.raises(ValueError, match="bos expected 'auto', 'always' or 'never', got bos='yes'"):
        _causal(hf_folders.tokenizer("gpt2"), 9, 4, bos="yes")
    with pytest.raises(ValueError, match="context=1 leaves no token to predict; causal_lm needs 2"):
        _causal(_with_start(), 9, 1)


def _texts(kind, batches):
    """The tokens of the text that each window holds."""
    inputs = _rows(batches, "input_ids")
    if kind == "gpt2":
        return inputs
    pairs = zip(inputs, _rows(batches, "labels"), strict=True)
    if kind == "t5":
        return [row[:-1] + labels[:-1] for row, labels in pairs]
    return [[t if v == IGNORED else v for t, v in zip(row, labels, strict=True)][1:-1] for row, labels in pairs]


def _cut(kind, documents, **options):
    tokenizer = TOKENIZERS.setdefault(kind, hf_folders.tokenizer(kind))
    found = text_windows(tokenizer, documents, task=hf_folders.TASKS[kind], context=10, **options)
    return found, _texts(kind, found.batches)


@pytest.mark.parametrize("kind", hf_folders.TASKS)
@given(wanted=st.integers(1, 300), length=st.integers(30, 300))
def test_windows_are_spread_evenly_over_the_text_or_are_the_first(kind, wanted, length):
    """Of n windows the k that are taken are those of number ⌊i n/k⌋."""
    text = [hf_folders.sentence(length)]
    (_, every), (found, spread), (_, first) = (
        _cut(kind, text),
        _cut(kind, text, num_tokens=wanted),
        _cut(kind, text, num_tokens=wanted, spread=False),
    )
    count, total = len(spread), len(every)
    assert found.num_windows == total and spread == [every[i * total // count] for i in range(count)]
    assert first == every[: len(first)]
    assert count == total or num_valid_tokens(found.batches) >= wanted


@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=8), wanted=st.integers(1, 60))
def test_no_window_is_of_two_documents_and_each_knows_its_own(lengths, wanted):
    documents = [" ".join([f"w{number}"] * length) for number, length in enumerate(lengths)]  # a word of its own each
    if max(lengths) < 2:
        with pytest.raises(ValueError, match="give a longer text"):
            _cut("gpt2", documents, num_tokens=wanted)
        return
    found, windows = _cut("gpt2", documents, num_tokens=wanted)
    word = {TOKENIZERS["gpt2"].convert_tokens_to_ids(f"w{number}"): number for number in range(len(lengths))}
    assert [{word[token] for token in window} for window in windows] == [{number} for number in found.documents]
    assert found.num_windows == sum(length // 10 + (length % 10 > 1) for length in lengths)
