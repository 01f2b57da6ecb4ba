"""Attention heads as parameters: the same function, slices of the heads they are called after, and exact blocks."""

import copy
import re

import pytest
import torch
from oracle import forward, gradient_rows, terms, token_loss
from torch import nn
from zoo import CASES, build

import fisherfunc as ff

FAMILIES = ["gpt2", "gpt_neox", "opt", "llama", "phi", "bloom", "bert", "albert", "distilbert", "t5", "bart"]
HEAD = re.compile(r"\.(?:query_|key_|value_)?head_(\d+)\.")


def total_loss(model, kind, batch):
    return sum(token_loss(kind, forward(model, kind, batch, term.sequence), term) for term in terms(kind, batch))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_function_is_the_same_and_a_slice_is_of_the_head_that_it_is_called_after(name):
    """With the columns of all heads but one at zero, nothing reaches the queries, keys and values of the others."""
    model, batch = build(name, dtype=torch.float64)
    kind, before = CASES[name].kind, {n: p.clone() for n, p in model.named_parameters()}
    divided = ff.divide_heads(model)
    count = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in divided.parameters()) == count
    precision = 1e-5 if CASES[name].casts else 1e-10
    for sequence in range(2):
        same = {"rtol": precision, "atol": precision}
        torch.testing.assert_close(
            forward(divided, kind, batch, sequence), forward(model, kind, batch, sequence), **same
        )
    heads = {n: int(found[1]) for n, _ in divided.named_parameters() if (found := HEAD.search(n))}
    assert set(heads.values()) == {0, 1}
    outputs = {n for n in heads if not re.search(r"(q|k|v|query|key|value|_lin|attn|qkv)(_proj|_lin)?\.\w*head_", n)}
    outputs |= {n for n in heads if "out_lin" in n}
    for kept in (0, 1):
        alone = copy.deepcopy(divided)
        with torch.no_grad():
            for n, parameter in alone.named_parameters():
                if n in outputs and heads[n] != kept:
                    parameter.zero_()
        total_loss(alone, kind, batch).backward()
        for n, parameter in alone.named_parameters():
            if n in heads and n not in outputs:
                reached = parameter.grad is not None and bool((parameter.grad != 0).any())
                assert reached == (heads[n] == kept), n
    assert outputs and all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def slices_of_gpt2(rows, head, size, width):
    """c_attn is (width, 3 width): queries, keys, values; c_proj is (width, width), read by rows."""
    begin = head * size
    columns = [part * width + begin + i for part in range(3) for i in range(size)]
    for layer in range(2):
        at = f"transformer.h.{layer}.attn"
        fused = rows[f"{at}.c_attn.weight"].unflatten(1, (width, 3 * width))[:, :, columns]
        output = rows[f"{at}.c_proj.weight"].unflatten(1, (width, width))[:, begin : begin + size]
        yield layer, torch.cat([fused.flatten(1), rows[f"{at}.c_attn.bias"][:, columns], output.flatten(1)], dim=1)


def slices_of_llama(rows, head, size, width):
    """q_proj is (heads · size, width), o_proj (width, heads · size); one head of keys and values serves both."""
    begin = head * size
    for layer in range(2):
        at = f"model.layers.{layer}.self_attn"
        queries = rows[f"{at}.q_proj.weight"].unflatten(1, (-1, width))[:, begin : begin + size]
        output = rows[f"{at}.o_proj.weight"].unflatten(1, (width, -1))[:, :, begin : begin + size]
        yield layer, torch.cat([queries.flatten(1), output.flatten(1)], dim=1)


@pytest.mark.parametrize(("name", "slices"), [("gpt2", slices_of_gpt2), ("llama", slices_of_llama)])
def test_blocks_by_head_are_those_of_slices_of_formed_gradients(name, slices):
    model, batch = build(name, dtype=torch.float64)
    kind = CASES[name].kind
    rows = gradient_rows(model, kind, batch)
    result = ff.fisher_spectrum(
        ff.divide_heads(model), batch, loss=getattr(ff.losses, kind)(), blocks=ff.by_head, population=False
    )
    tolerance = 1e-4 if CASES[name].casts else 1e-10
    num_params = 0
    for head in (0, 1):
        for layer, formed in slices(rows, head, 8, 16):
            found = result.blocks[f"layer.{layer}.head.{head}"]
            wanted = torch.linalg.eigvalsh(formed @ formed.T / len(formed)).flip(-1)
            torch.testing.assert_close(found.eigenvalues, wanted, rtol=0, atol=tolerance * float(wanted[0]))
            assert found.num_params == formed.shape[1]
            num_params += found.num_params
    if name == "llama":
        for layer in range(2):
            at = f"model.layers.{layer}.self_attn"
            formed = torch.cat([rows[f"{at}.{part}_proj.weight"] for part in "kv"], dim=1)
            wanted = torch.linalg.eigvalsh(formed @ formed.T / len(formed)).flip(-1)
            found = result.blocks[f"layer.{layer}.kv_head.0"].eigenvalues
            torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * float(wanted[0]))
    everything = torch.cat(list(rows.values()), dim=1)
    wanted = torch.linalg.eigvalsh(everything @ everything.T / len(everything)).flip(-1)
    torch.testing.assert_close(result.full.eigenvalues, wanted, rtol=0, atol=tolerance * float(wanted[0]))
    assert {"layer.0.rest", "layer.1.rest", "embedding", "final_norm"} <= set(result.blocks)


def test_no_gradient_of_a_projection_is_formed():
    """Each piece is a linear map, which the factored route holds as factors, like the projection as a whole."""
    model, batch = build("gpt2")
    plan = ff.plan(ff.divide_heads(model), batch, loss=ff.losses.causal_lm(), calibrate=False)
    assert {cost.route for name, cost in plan.parameters.items() if "attn" in name}.isdisjoint({"autograd"})


def test_self_and_cross_attention_of_a_layer_stay_apart():
    model, _ = build("t5")
    blocks = ff.partition(dict(ff.divide_heads(model).named_parameters()), ff.by_head)
    assert {"encoder.layer.0.head.0", "decoder.layer.0.head.1", "decoder.layer.0.cross_head.1"} <= set(blocks)
    assert not set(blocks["decoder.layer.0.head.1"]) & set(blocks["decoder.layer.0.cross_head.1"])


class Plain(nn.Module):
    """Attention without a configuration, outside any stack."""

    def __init__(self):
        super().__init__()
        self.attn = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("q_proj", "k_proj", "v_proj", "o_proj")})

    def forward(self, x):
        q, k, v = (self.attn[f"{part}_proj"](x) for part in "qkv")
        return self.attn["o_proj"](q * k + v)


def test_a_model_of_ones_own_says_how_many_heads_it_has():
    blocks = ff.partition(dict(ff.divide_heads(Plain(), num_heads=2).named_parameters()), ff.by_head)
    assert list(blocks) == ["attn.head.0", "attn.head.1", "attn.o_proj"] and len(blocks["attn.head.0"]) == 7


def tied(model):
    model.attn["k_proj"].weight = model.attn["q_proj"].weight
    return model


def adapted(model):
    nn.utils.parametrizations.weight_norm(model.attn["q_proj"])
    return model


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: nn.Linear(2, 2), r"Linear has no attention module .* write a rule of your own"),
        (Plain, r"'attn' does not say how many heads it has; give divide_heads num_heads="),
        (lambda: (Plain(), 3), r"has 4 inputs, which 3 heads do not divide"),
        (lambda: tied(Plain()), r"'attn.k_proj.weight' is tied to 'attn.q_proj.weight'"),
        (lambda: adapted(Plain()), r"'attn.q_proj' is a ParametrizedLinear, expected a torch.nn.Linear; merge"),
        (lambda: build("falcon")[0], r"has multi_query: where its heads lie is not known"),
    ],
    ids=["none", "no count", "count", "tied", "adapter", "layout"],
)
def test_what_cannot_be_divided_is_an_error(make, says):
    made = make()
    model, count = made if isinstance(made, tuple) else (made, None)
    with pytest.raises(ValueError, match=says):
        ff.divide_heads(model, num_heads=count)


def test_by_head_of_a_model_that_is_not_divided_is_an_error():
    model, batch = build("gpt2")
    with pytest.raises(ValueError, match=r"all heads in one parameter; divide the model first: .*divide_heads"):
        ff.fisher_spectrum(model, batch, loss=ff.losses.causal_lm(), blocks=ff.by_head)
