"""The partition's laws and errors, and the rules on plain PyTorch modules and wrapped models."""

import inspect

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fisherfunc.partitioning import OTHER, RULES, by_layer, by_module, by_parameter, partition, whole

BODIES = """
    model transformer backbone albert beit bert convnext deberta deit dinov2 distilbert electra esm
    funnel gpt_neox layoutlm longformer mobilebert mpnet resnet roberta rwkv swin vit wav2vec2
"""
PARTS = ["model", "h", "layers", "encoder", "decoder", "0", "11", "attn", "ln_1", "lm_head", "lora_A", "x"]
part = st.sampled_from(PARTS) | st.text(max_size=4)
names = st.lists(part, min_size=1, max_size=7).map(".".join).filter(bool)
names_lists = st.lists(names, min_size=1, max_size=30, unique=True)


def names_of(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters()]


@given(names_lists, st.sampled_from(list(RULES.values())))
def test_blocks_are_disjoint_and_together_the_input_in_order(names, rule):
    blocks = partition(names, rule)
    placed = [name for members in blocks.values() for name in members]
    assert sorted(placed) == sorted(names)
    assert all(list(members) == sorted(members, key=names.index) for members in blocks.values())
    assert list(blocks) == list(dict.fromkeys(map(rule, names)))
    assert all(rule(name) == label for label, members in blocks.items() for name in members)


@given(names_lists)
def test_by_parameter_gives_singletons_and_whole_gives_one_block(names):
    assert partition(names, by_parameter) == {name: (name,) for name in names}
    assert partition(iter(names), whole) == {"all": tuple(names)}


@given(names_lists, st.randoms(use_true_random=False))
def test_a_label_does_not_depend_on_the_other_names_or_their_order(names, random):
    shuffled = random.sample(names, len(names))
    for rule in (by_layer, by_module):
        blocks, again = partition(names, rule), partition(shuffled, rule)
        assert {label: set(m) for label, m in blocks.items()} == {k: set(m) for k, m in again.items()}


@pytest.mark.parametrize(
    ("names", "rule", "error", "says"),
    [
        (["a"], "layer", TypeError, r"partition by 'layer' of type str; pass by_layer, .* function"),
        ("a.weight", by_layer, TypeError, r"the string 'a.weight'; pass an iterable of names"),
        ([], by_layer, ValueError, r"no parameter names; check"),
        (["a", "b", "a"], by_layer, ValueError, r"'a' occurs more than once among 3; expected"),
        (iter(["a", 3]), by_layer, TypeError, r"partition 3 of type int: expected .* names only"),
        (["a", "b"], {"a": "x"}.get, TypeError, r"parameter 'b' the label None of type NoneType"),
        (["a.b"], lambda name: 7, TypeError, r"parameter 'a.b' the label 7 of type int; expected a"),
        (["a.b"], lambda name: "", ValueError, r"parameter 'a.b' the label ''; expected a non-empty"),
    ],
)
def test_errors_say_what_failed_and_what_to_do(names, rule, error, says):
    unchecked = inspect.unwrap(partition)  # without the tests' own type checker, as users run it
    with pytest.raises(error, match=says):
        unchecked(names, rule)


def test_labels_kept_in_a_dictionary_are_a_rule():
    assert partition(["a", "b"], {"a": "x", "b": "y"}.get) == {"x": ("a",), "y": ("b",)}


def test_transformer_layers_of_encoder_and_decoder_stay_apart():
    model = nn.Transformer(4, 2, 2, 3, 8, batch_first=True, device="meta")
    blocks = partition(names_of(model), by_layer)
    layers = {f"encoder.layer.{i}" for i in range(2)} | {f"decoder.layer.{i}" for i in range(3)}
    assert blocks.keys() == layers | {"encoder.final_norm", "decoder.final_norm"}
    for label, members in blocks.items():
        stream, *_, last = label.split(".")
        assert all(name.startswith(f"{stream}.") for name in members)
        assert all(f".{last}." in name for name in members if label in layers)
    roles = partition(names_of(model), by_module)
    assert roles.keys() == {"attention", "mlp", "normalization"}
    assert all("_attn" in name for name in roles["attention"])
    assert all(".linear" in name for name in roles["mlp"])


def test_attention_on_its_own_is_attention():
    names = names_of(nn.MultiheadAttention(4, 2))
    names += names_of(nn.MultiheadAttention(4, 2, kdim=3, vdim=3, add_bias_kv=True))
    assert set(partition(dict.fromkeys(names), by_module)) == {"attention"}


def test_each_depth_of_a_recurrent_network_is_one_layer():
    model = nn.ModuleDict({"lstm": nn.LSTM(2, 2, num_layers=2, bidirectional=True, proj_size=1)})
    blocks = partition(names_of(model), by_layer)
    assert {label: len(members) for label, members in blocks.items()} == {"lstm.l0": 10, "lstm.l1": 10}
    assert set(partition(names_of(nn.GRU(2, 2, num_layers=3)), by_layer)) == {"l0", "l1", "l2"}


def test_numbered_modules_are_layers():
    inner = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert set(partition(names_of(nn.Sequential(nn.Linear(2, 2), inner)), by_layer)) == {
        "layer.0",
        "layer.1",
    }
    autoencoder = nn.ModuleDict({"encoder": inner, "decoder": nn.Sequential(nn.Linear(2, 2))})
    assert set(partition(names_of(autoencoder), by_layer)) == {
        "encoder.layer.0",
        "encoder.layer.1",
        "decoder.layer.0",
    }


@pytest.mark.parametrize(
    ("name", "layer", "module"),
    [
        line.split()
        for line in """
        cls_token                                               other               embedding
        logit_scale                                             other               other
        fc1.weight                                              fc1                 mlp
        fc.weight                                               fc                  other
        bn1.weight                                              bn1                 normalization
        conv1.weight                                            conv1               other
        layer1.0.conv1.weight                                   layer1.0            other
        features.1.0.block.0.0.weight                           features.1          other
        classifier.6.weight                                     output              output
        encoder.weight                                          encoder             other
        decoder.bias                                            output              output
        encoder.layers.encoder_layer_3.mlp.0.weight             encoder.layer.3     mlp
        vit.encoder.layer.3.attention.attention.query.weight    encoder.layer.3     attention
        model.layers.0.block_sparse_moe.experts.3.w1.weight     layer.0             mlp
        model.vision_tower.encoder.layers.0.mlp.fc1.weight      vision_tower.encoder.layer.0  mlp
        model.language_model.layers.0.mlp.up_proj.weight        language_model.layer.0  mlp
        encoder.encoder.layer.2.attention.self.query.weight     encoder.layer.2     attention
        decoder.transformer.h.1.crossattention.c_attn.weight    decoder.layer.1     attention
        sentence_embedder.layers.4.attn.qkv.weight     sentence_embedder.layer.4    attention
        gpt_neox.embed_out.weight                               output              output
        blocks.0.attn.W_Q                                       layer.0             attention
        deberta.encoder.conv.LayerNorm.weight       deberta.encoder.conv.LayerNorm  normalization
        conv_1.weight                                           conv_1              other
        layers.0.in_proj_weight                                 layer.0             attention
        layers.0.qkv.weight                                     layer.0             attention
        layers.0.query.bias                                     layer.0             attention
        layers.0.key.bias                                       layer.0             attention
        layers.0.value.bias                                     layer.0             attention
        value.bias                                              value               other
        layers.0.k_proj.weight                                  layer.0             attention
        layers.0.feedforward.0.weight                           layer.0             mlp
        layers.0.gate_proj.weight                               layer.0             mlp
        layers.0.up_proj.weight                                 layer.0             mlp
        layers.0.down_proj.weight                               layer.0             mlp
        layers.0.gate_up_proj.weight                            layer.0             mlp
        layers.0.router.weight                                  layer.0             mlp
        layers.0.gate.weight                                    layer.0             mlp
        layers.0.experts.3.weight                               layer.0             mlp
        layers.0.moe.weight                                     layer.0             mlp
        layers.0.ssm.A                                          layer.0             mixer
        layers.0.ln.weight                                      layer.0             normalization
        layers.0.bn.weight                                      layer.0             normalization
        emb.weight                                              embedding           embedding
        tok_emb.weight                                          embedding           embedding
        qformer.query_tokens                                    qformer.embedding   embedding
        output.weight                                           output              output
        proj_out.weight                                         output              output
        heads.0.weight                                          output              output
        qa_outputs.weight                                       output              output
        sequence_summary.summary.weight                         output              output
        ln_final.w                                              final_norm          normalization
        visual.transformer.resblocks.0.attn.in_proj_bias        visual.layer.0      attention
        visual.ln_post.weight                                   visual.final_norm   normalization
        model.language_model.norm.weight                        language_model.final_norm  normalization
        model.vision_tower.post_layernorm.weight                vision_tower.final_norm  normalization
        model.audio_tower.layer_norm.weight                     audio_tower.final_norm  normalization
        unembed.W_U                                             output              output
    """.strip().splitlines()
    ],
)
def test_labels_of_other_naming_schemes(name, layer, module):
    assert (by_layer(name), by_module(name)) == (layer, module)


@pytest.mark.parametrize(
    ("wrapped", "plain"),
    [
        line.split()
        for line in """
        base_model.model.transformer.h.0.attn.c_attn.lora_A.default.weight  transformer.h.0.attn.c_attn.weight
        base_model.model.model.layers.0.mlp.up_proj.base_layer.weight  model.layers.0.mlp.up_proj.weight
        base_model.model.model.embed_tokens.lora_embedding_A.default   model.embed_tokens.weight
        base_model.model.classifier.modules_to_save.default.weight     classifier.weight
        base_model.model.fc1.lora_magnitude_vector.default.weight      fc1.weight
        fc1.parametrizations.weight.original0                          fc1.weight
        lstm.parametrizations.weight_hh_l1.original                    lstm.weight_hh_l1
        _orig_mod.module.lm_head.weight                                lm_head.weight
        model.layers.3._checkpoint_wrapped_module.mlp.up_proj.weight   model.layers.3.mlp.up_proj.weight
        _fsdp_wrapped_module.fc1._checkpoint_wrapped_module.weight     fc1.weight
        conv1.base_layer.weight                                        conv1.weight
        conv1.modules_to_save.default.weight                           conv1.weight
        conv1.original_module.weight                                   conv1.weight
        conv1.ia3_l.default                                            conv1.weight
        0.auto_model.encoder.layer.3.output.dense.weight       bert.encoder.layer.3.output.dense.weight
    """.strip().splitlines()
    ],
)
def test_an_adapter_or_a_wrapper_changes_no_label(wrapped, plain):
    assert (by_layer(wrapped), by_module(wrapped)) == (by_layer(plain), by_module(plain))
    assert by_layer(plain) != OTHER


@pytest.mark.parametrize("body", BODIES.split())
def test_the_name_of_the_one_body_is_no_part_of_a_label(body):
    assert by_layer(f"{body}.encoder.layers.3.fc1.weight") == "encoder.layer.3"
    assert by_layer(f"{body}.layernorm.weight") == "final_norm"
