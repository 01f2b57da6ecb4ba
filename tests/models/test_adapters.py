"""Adapter folders of PEFT: loaded on their base where that is here, else an error that says what they are."""

import json

import hf_folders
import pytest
import torch
from commands import run

import fisherfunc as ff
from fisherfunc.models import adapters
from fisherfunc.models.huggingface import load, text_batches
from fisherfunc.surface.files import read_spectrum


def described(folder, **settings):
    """A folder as `PeftModel.save_pretrained` leaves it, as far as nobody reads the weights."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **settings}))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    return folder


@pytest.mark.parametrize("installed", [False, True])
@pytest.mark.parametrize("base", ["owner/not-downloaded", "/gone/base model", None])
def test_an_adapter_that_cannot_be_loaded_is_called_one(tmp_path, monkeypatch, installed, base):
    monkeypatch.setattr(adapters, "find_spec", lambda name: installed or None)
    folder = described(tmp_path / "a", base_model_name_or_path=base, task_type="CAUSAL_LM")
    with pytest.raises(FileNotFoundError) as caught:
        load(folder)
    said = str(caught.value)
    assert f"a is a PEFT adapter of {base or 'a model that it does not name'} (adapter_config.json)" in said
    assert ("its base is not" if installed else "PEFT is not installed") in said
    assert "merge it (merge_and_unload) and save, or pass the PeftModel to fisherfunc.fisher_spectrum" in said


def test_an_adapter_for_another_task_and_one_beside_a_whole_model_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"adapter of b .*task_type='SEQ_CLS', expected CAUSAL_LM or SEQ_2_SEQ_LM"):
        load(described(tmp_path / "a", base_model_name_or_path="b", task_type="SEQ_CLS"))
    both = hf_folders.write("gpt2", tmp_path / "both")
    (both / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds a whole model and a PEFT adapter .*cannot be told which is meant"):
        load(both)
    damaged = described(tmp_path / "damaged")
    (damaged / "adapter_config.json").write_text("[1]")
    with pytest.raises(ValueError, match="is not a JSON object"):
        load(damaged)


@pytest.fixture
def adapted(tmp_path):
    """The folders of a base and of an adapter that does something, and the model that was saved."""
    peft = pytest.importorskip("peft")
    base = hf_folders.write("gpt2", tmp_path / "base")
    model = load(base).model
    settings = peft.LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(1)
    model = peft.get_peft_model(model, settings).eval()
    model.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(base)}))
    return base, tmp_path / "adapter", model


def test_an_adapter_is_loaded_on_its_base_and_its_parameters_are_those_of_the_fisher(adapted, hub, here):
    base, folder, model = adapted
    loaded = load(folder, dtype=torch.float64)
    assert (loaded.task, loaded.adapter_of) == ("causal_lm", str(base))
    text = hf_folders.sentence(30)
    batches = text_batches(loaded.tokenizer, text, task="causal_lm", context=8, num_tokens=20)
    saved = model.double()
    for parameter in saved.parameters():
        assert parameter.dtype == torch.float64
    want = ff.fisher_spectrum(saved, batches, num_tokens=20, loss=ff.losses.causal_lm())
    got = ff.fisher_spectrum(loaded.model, batches, num_tokens=20, loss=ff.losses.causal_lm())
    assert 0 < got.full.num_params == want.full.num_params < sum(p.numel() for p in loaded.model.parameters())
    torch.testing.assert_close(got.full.eigenvalues, want.full.eigenvalues)
    ran = run("--model", folder, "--text", hub / "text.txt", "--tokens", 20, "--out", "o")
    assert ran.exit_code == 0, ran.stderr
    assert "adapter of" in ran.stdout and "those of the base are frozen" in " ".join(ran.stdout.split())
    assert read_spectrum("o").metadata["adapter_of"] == str(base)


def test_weights_that_an_adapter_lacks_are_an_error(adapted):
    from safetensors.torch import load_file, save_file

    _, folder, _ = adapted
    weights = load_file(folder / "adapter_model.safetensors")
    save_file(dict(list(weights.items())[1:]), folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"the adapter in .* cannot be read .*missing adapter keys"):
        load(folder)
