"""Loading Hugging Face folders, their failures, and the cutting of a text into windows."""

from pathlib import Path

import hf_folders
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fisherfunc.models import huggingface
from fisherfunc.models.huggingface import load, num_valid_tokens, task_of, text_batches

IGNORED = -100
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    return {kind: hf_folders.write(kind, root / kind) for kind in hf_folders.TASKS}


@pytest.fixture
def gpt2(folders, tmp_path):
    """A copy of the tiny GPT-2 to be damaged."""
    return hf_folders.copy(folders["gpt2"], tmp_path / "model")


@pytest.mark.parametrize("kind", hf_folders.TASKS)
def test_a_folder_gives_its_own_weights_task_and_limit(folders, kind):
    loaded = load(folders[kind], dtype=torch.float64)
    want = hf_folders.model(kind).state_dict()
    got = loaded.model.state_dict()
    assert loaded.task == hf_folders.TASKS[kind]
    assert loaded.name == str(folders[kind])
    assert loaded.max_context == (None if kind == "t5" else hf_folders.CONTEXT)
    assert not loaded.model.training
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name].double()) for name in want)


def test_shards_and_surplus_tensors_are_harmless(tmp_path):
    folder = hf_folders.write("gpt2", tmp_path / "shards", max_shard_size="5KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert load(folder).task == "causal_lm"
    single = hf_folders.write("gpt2", tmp_path / "single")
    save_file(load_file(single / WEIGHTS) | {"extra": torch.ones(2)}, single / WEIGHTS, metadata={"format": "pt"})
    assert load(single).task == "causal_lm"


def _truncate(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-500])


def _drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors["transformer.h.1.mlp.c_fc.weight"]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def _pickle_garbage(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"garbage" * 100)


def _no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


DAMAGE = {
    "truncated weights": (_truncate, ValueError, r"model\.safetensors is corrupt: .*not fully covered"),
    "empty weights": (lambda f: (f / WEIGHTS).write_bytes(b""), ValueError, r"model\.safetensors is corrupt"),
    "a corrupt pickle": (_pickle_garbage, ValueError, "UnpicklingError: the .bin file is corrupt"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), ValueError, "weights in .* cannot be read .*no file named"),
    "a missing tensor": (_drop_tensor, ValueError, r"1 tensor.* missing .*h\.1\.mlp\.c_fc\.weight"),
    "another shape": (
        lambda f: hf_folders.edit_config(f, vocab_size=50),
        ValueError,
        r"mismatched .*transformer\.wte\.weight",
    ),
    "no configuration": (lambda f: (f / "config.json").unlink(), FileNotFoundError, r"no config\.json"),
    "broken configuration": (
        lambda f: (f / "config.json").write_text("{"),
        ValueError,
        r"config\.json is not valid JSON",
    ),
    "a list as configuration": (lambda f: (f / "config.json").write_text("[1]"), ValueError, "holds a list"),
    "a wrong value": (lambda f: hf_folders.edit_config(f, n_layer="two"), ValueError, "n_layer"),
    "an unknown model type": (
        lambda f: hf_folders.edit_config(f, model_type="nonsense"),
        ValueError,
        "model type `nonsense`",
    ),
    "a broken tokenizer": (
        lambda f: (f / "tokenizer.json").write_text("{"),
        ValueError,
        "tokenizer in .* cannot be read",
    ),
    "no tokenizer": (_no_tokenizer, FileNotFoundError, "has no tokenizer"),
    "quantised": (
        lambda f: hf_folders.edit_config(f, quantization_config={"quant_method": "gptq", "bits": 4}),
        ValueError,
        r"quantised \(gptq\)",
    ),
    "no language model": (
        lambda f: hf_folders.edit_config(f, architectures=["GPT2ForSequenceClassification"]),
        ValueError,
        "GPT2ForSequenceClassification.*ForCausalLM.*ForMaskedLM",
    ),
    "no architecture": (lambda f: hf_folders.edit_config(f, architectures=None), ValueError, r"architectures=\[\]"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_folder_is_an_error_that_names_the_damage(gpt2, what):
    damage, error, message = DAMAGE[what]
    damage(gpt2)
    with pytest.raises(error, match=message) as caught:
        load(gpt2)
    assert str(gpt2) in str(caught.value)


def test_a_missing_head_is_never_left_at_random(tmp_path):
    hf_folders.tokenizer("bert").save_pretrained(tmp_path)
    hf_folders.model("bert").bert.save_pretrained(tmp_path)
    hf_folders.edit_config(tmp_path, architectures=["BertForMaskedLM"])
    with pytest.raises(ValueError, match=r"BertForMaskedLM are missing .*cls\.predictions"):
        load(tmp_path)


@pytest.mark.parametrize(
    "name", ["/no/such/folder", "./none", "../none", "a/b/c", "none/", "~/no-such-folder-here", ""]
)
def test_an_absent_folder_is_named_and_no_hub_is_asked(name, monkeypatch):
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", None)
    with pytest.raises(FileNotFoundError, match="there is no model folder") as caught:
        load(name)
    assert repr(name) in str(caught.value)


def test_an_unknown_hub_id_is_named():
    with pytest.raises(OSError, match="no folder is called 'no-such-owner/no-such-model'"):
        load("no-such-owner/no-such-model")


def test_a_file_in_place_of_a_folder_is_an_error(gpt2):
    with pytest.raises(ValueError, match="is a file; give the folder"):
        load(gpt2 / WEIGHTS)


@pytest.mark.parametrize("device", ["cuda:99", "nonsense", "meta"])
def test_an_unusable_device_is_named(folders, device):
    with pytest.raises(ValueError, match=f"device '{device}' cannot be used"):
        load(folders["gpt2"], device=device)


def test_without_transformers_the_extra_is_named(folders, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ImportError, match=r'pip install "fisherfunc\[hf\]"'):
        load(folders["gpt2"])


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("LlamaForCausalLM", "causal_lm"),
        ("GPT2LMHeadModel", "causal_lm"),
        ("BertLMHeadModel", "causal_lm"),
        ("RobertaForMaskedLM", "masked_lm"),
    ],
)
def test_the_task_follows_the_architecture(architecture, task):
    config = type("Config", (), {"architectures": [architecture]})
    assert task_of(config) == task


def test_positions_that_start_after_the_padding_id_are_not_counted():
    import transformers as hf

    config = hf.RobertaConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        max_position_embeddings=20,
        pad_token_id=1,
    )
    limit = huggingface.max_context(hf.RobertaForMaskedLM(config), hf_folders.tokenizer("bert"))
    assert limit == 18


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
