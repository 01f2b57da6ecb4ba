"""Loading Hugging Face folders, their failures, and the cutting of a text into windows."""

import json
from pathlib import Path

import hf_folders
import pytest
import torch
from safetensors.torch import load_file, save_file

from fisherfunc.models import huggingface
from fisherfunc.models.huggingface import load, task_of

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


def test_a_quantised_model_needs_an_adapter_on_it():
    settings = {"architectures": ["LlamaForCausalLM"], "quantization_config": {"quant_method": "bitsandbytes"}}
    config = type("Config", (), settings)
    assert task_of(config, adapted=True) == "causal_lm"
    with pytest.raises(ValueError, match=r"quantised \(bitsandbytes\).*the folder of an adapter on it"):
        task_of(config)


@pytest.mark.parametrize(("causal", "task"), [(True, "causal_lm"), (False, "masked_lm")])
def test_xlm_is_what_its_configuration_says(causal, task):
    config = type("Config", (), {"architectures": ["XLMWithLMHeadModel"], "causal": causal})
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


def test_a_weight_that_is_not_finite_is_named_with_its_count(tmp_path):
    folder = hf_folders.write("gpt2", tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    name = "transformer.h.0.mlp.c_fc.weight"
    weights[name][0, :3] = torch.tensor([float("nan"), float("inf"), 1.0])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=rf"m: {name} holds NaN and infinity \(2 of 1024 values\); .*earlier checkpoint"
    ):
        load(folder)
    weights["transformer.wte.weight"][:] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"transformer\.wte\.weight holds NaN \(736 of 736 values\), and so do 1 other"
    ):
        load(folder)


def test_a_decoder_that_knows_no_start_is_an_error_that_names_what_is_missing(tmp_path):
    folder = hf_folders.write("t5", tmp_path / "m")
    for file in ("config.json", "generation_config.json"):
        settings = json.loads((folder / file).read_text())
        settings.pop("decoder_start_token_id", None)
        (folder / file).write_text(json.dumps(settings))
    with pytest.raises(
        ValueError, match=r"its decoder has nothing to start from.*lacks decoder_start_token_id .*add it"
    ):
        load(folder)


@pytest.mark.parametrize("known", [False, True])
def test_code_that_comes_with_a_model_is_not_run_and_said_so(tmp_path, known):
    """Where Transformers knows the type of the model its own code is right; else the error says what to do."""
    folder = hf_folders.write("gpt2", tmp_path / "m")
    (folder / "configuration_x.py").write_text("raise SystemExit('this code ran')")
    auto = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.X"}
    hf_folders.edit_config(folder, auto_map=auto, **({} if known else {"model_type": "x"}))
    if known:
        assert type(load(folder).model).__name__ == "GPT2LMHeadModel"
        return
    with pytest.raises(
        ValueError, match=r"m needs code of its own .*runs no code that comes with a model; load it yourself"
    ):
        load(folder)
