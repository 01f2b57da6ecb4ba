"""Which loss it is: the same source is the same one in every process, another code is another, whatever its name."""

import functools
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from folders import REPOSITORY
from own_losses import F, Options, Pair, Scaled, Smoothed, Weighted, compiled, counted, cross, through, with_options
from spectra import spectrum
from torch import nn

import fisherfunc as ff
from fisherfunc.gradients.losses.identity import loss_id
from fisherfunc.linalg.grams.which_loss import UNIDENTIFIED
from fisherfunc.records.code_hash import UnidentifiedError, code_hash

SAME = {
    "a lambda": lambda: lambda o, b: 3 * F.cross_entropy(o, b[-1], reduction="none"),
    "a closure": lambda: through(2.0),
    "a tensor": lambda: through(torch.tensor([1.0, 2.0])),
    "a partial": lambda: functools.partial(cross, eps=0.2),
    "an object": lambda: Scaled(2.0),
    "a method": lambda: Scaled(2.0).loss,
    "a static method": lambda: Scaled(2.0).alone,
    "a decorated one": lambda: counted(cross),
    "a module": lambda: Weighted(torch.ones(2)),
    "torch's module": lambda: nn.CrossEntropyLoss(reduction="none"),
    "a module with super": lambda: Smoothed(label_smoothing=0.1),
    "settings": lambda: with_options(Options(0.3)),
    "a named tuple": lambda: through(Pair(1, 2.0)),
    "a set": lambda: through({"a", "b", "c", "d"}),
    "a dtype": lambda: through(torch.float32),
    "a comment": lambda: compiled("def f(o, b):\n    return o * 2"),
    "cached": lambda: functools.lru_cache(cross),
    "of vmap": lambda: torch.func.vmap(lambda o: 2 * o),
}
SOURCES = ("def f(o, b):\n    return o * 2", "\n\n# moved\ndef f(out, b):\n    'Says what it is.'\n    return out * 2")


def identity(values, **options):
    return loss_id(ff.losses.custom(values, **{"name": "mine", **options}))


@pytest.mark.parametrize("what", SAME)
def test_the_same_code_is_the_same_loss(what):
    assert identity(SAME[what]()) == identity(SAME[what]())
    assert UNIDENTIFIED not in identity(SAME[what]())


def test_names_lines_comments_and_docstrings_of_functions_do_not_count():
    assert identity(compiled(SOURCES[0])) == identity(compiled(SOURCES[1]))


def changed_global(value):
    return compiled("def f(o, b):\n    return SCALE * g(o)", SCALE=value, g=compiled("def f(o):\n    return o + 1"))


DIFFERENT = {
    "code": (lambda o, b: o + 1, lambda o, b: o - 1),
    "a constant": (lambda o, b: 2.0 * o, lambda o, b: 3.0 * o),
    "a sign of zero": (lambda o, b: o + 0.0, lambda o, b: o - 0.0),
    "a type": (through(2), through(2.0)),
    "a truth": (through(True), through(1)),
    "a function of torch": (lambda o, b: F.relu(o), lambda o, b: F.gelu(o)),
    "a function in C": (through(torch.exp), through(torch.sin)),
    "a closure": (through(2.0), through(3.0)),
    "a tensor": (through(torch.tensor([1.0, 2.0])), through(torch.tensor([1.0, 3.0]))),
    "a dtype": (through(torch.float32), through(torch.float64)),
    "an array": (through(torch.ones(2).numpy()), through(torch.zeros(2).numpy())),
    "a default": (lambda o, b, eps=0.1: o * eps, lambda o, b, eps=0.2: o * eps),
    "a keyword default": (lambda o, b, *, eps=0.1: o * eps, lambda o, b, *, eps=0.2: o * eps),
    "a global": (changed_global(1.0), changed_global(2.0)),
    "a function that it calls": (
        compiled("def f(o, b):\n    return g(o)", g=lambda o: o + 1),
        compiled("def f(o, b):\n    return g(o)", g=lambda o: o + 2),
    ),
    "a function within": (lambda o, b: (lambda x: x + 1)(o), lambda o, b: (lambda x: x + 2)(o)),
    "a partial": (functools.partial(cross, eps=0.1), functools.partial(cross, eps=0.2)),
    "a function in a partial": (functools.partial(cross), functools.partial(through(1.0))),
    "an object": (Scaled(2.0), Scaled(3.0)),
    "a method": (Scaled(2.0).loss, Scaled(3.0).loss),
    "another method": (Scaled(2.0).loss, Scaled(2.0).scaled),
    "a method of all attributes": (Scaled(2.0, 1).of_any, Scaled(2.0, 2).of_any),
    "a property": (Scaled(2.0).by_property, Scaled(3.0).by_property),
    "a module": (Weighted(torch.ones(2)), Weighted(torch.zeros(2))),
    "a mode": (Weighted(torch.ones(2)), Weighted(torch.ones(2)).eval()),
    "an option of torch's module": (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.1)),
    "torch's modules": (nn.CrossEntropyLoss(reduction="none"), nn.NLLLoss(reduction="none")),
    "an option of super": (Smoothed(label_smoothing=0.1), Smoothed(label_smoothing=0.2)),
    "a decorator": (cross, counted(cross)),
    "a wrapper of torch's": (counted(F.relu), F.relu),
    "what a decorator wraps": (counted(through(1.0)), counted(through(2.0))),
    "settings": (with_options(Options(0.1)), with_options(Options(0.2))),
    "cached": (functools.lru_cache(cross), functools.lru_cache(through(1.0))),
    "of vmap": (torch.func.vmap(lambda o: 2 * o), torch.func.vmap(lambda o: 3 * o)),
    "a name of torch's": (
        compiled("def f(o, b):\n    return o + 1", __name__="torch.nn.functional"),
        compiled("def f(o, b):\n    return o + 2", __name__="torch.nn.functional"),
    ),
    "a base class": (
        type("A", (), {"__call__": lambda self, o, b: o})(),
        type("B", (), {"__call__": lambda self, o, b: 2 * o})(),
    ),
    "an import": (
        compiled("def f(o, b):\n    import math\n    return o * math.pi"),
        compiled("def f(o, b):\n    import math\n    return o * math.e"),
    ),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_another_code_is_another_loss(what):
    one, two = (identity(values) for values in DIFFERENT[what])
    assert one != two and not {one, two} & {None} and UNIDENTIFIED not in one + two


def test_the_valid_tokens_the_name_and_the_kind_count():
    plain = ff.losses.custom(cross)
    assert loss_id(plain) != loss_id(ff.losses.custom(cross, name="other"))
    assert loss_id(plain) != loss_id(ff.losses.custom(cross, valid=lambda batch: batch[-1] > 0))
    assert loss_id(replace(plain, shift=1)) != loss_id(plain)
    ours = [
        ff.losses.causal_lm,
        ff.losses.masked_lm,
        ff.losses.seq2seq_lm,
        ff.losses.classification,
        ff.losses.regression,
    ]
    assert len({loss_id(make()) for make in ours}) == 5 and loss_id(ours[0]()) == loss_id(ours[0]())
    assert loss_id(ff.losses.custom(cross, name="classification")) != loss_id(ff.losses.classification())
    assert "Python" in loss_id(plain) and "Python" not in loss_id(ff.losses.classification())


def test_of_an_object_only_what_the_method_reads_counts():
    """The loss of a trainer that also holds the weights is one loss at every checkpoint."""
    assert identity(Scaled(2.0, torch.ones(2)).loss) == identity(Scaled(2.0, torch.zeros(2)).loss)
    assert identity(Scaled(2.0, threading.Lock()).loss) == identity(Scaled(2.0).loss)


UNKNOWN = {
    "a generator": through(x for x in "ab"),
    "a lock": through(threading.Lock()),
    "an import of the user's": compiled("def f(o, b):\n    import oracle\n    return oracle.f(o)"),
    "a module as a whole": compiled("def f(o, b):\n    return g(m)", m=sys.modules[__name__]),
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_what_cannot_be_identified_says_so_and_is_not_equal(what):
    found = identity(UNKNOWN[what])
    assert found.startswith(f"{UNIDENTIFIED}: ") and len(found) > len(UNIDENTIFIED) + 5
    with pytest.raises(UnidentifiedError):
        code_hash(UNKNOWN[what])
    facts = {"loss": "mine", "loss_id": found, "tokens": "0123"}
    results = {name: spectrum(("a",), **facts) for name in "xy"}
    with pytest.raises(ValueError, match=f"cannot be compared: loss: .mine, shift 0, code {UNIDENTIFIED}"):
        ff.compare(results)
    assert list(ff.compare(results, across={"loss"}).differing) == ["loss"]


def test_objects_that_hold_themselves_and_methods_that_call_each_other_end():
    class Pair:
        def ping(self, n):
            return self.pong(n - 1)

        def pong(self, n):
            return self.ping(n) if n else self

    one = Pair()
    one.itself = [one]
    assert identity(one.ping) == identity(one.ping) and UNIDENTIFIED not in identity(one.ping)


def test_another_process_finds_the_same_whatever_the_seed_of_its_hashes():
    code = (
        f"import sys, json; sys.path[:0] = ['tests', 'tests/support', {str(Path(__file__).parent)!r}];"
        "import conftest, test_identity as t;"
        "print(json.dumps({name: t.identity(make()) for name, make in t.SAME.items()}))"
    )
    here = {name: identity(make()) for name, make in SAME.items()}
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == here


def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 3, generator=generator), torch.randint(4, (6,), generator=generator)


def fisher(loss):
    torch.manual_seed(0)
    return ff.fisher_spectrum(nn.Linear(3, 4), batch(), loss=loss)


def test_compare_takes_two_lambdas_for_one_loss_only_where_they_are():
    def plain():
        return lambda o, b: F.cross_entropy(o, b[-1], reduction="none")

    a, same, other = fisher(plain()), fisher(plain()), fisher(lambda o, b: 3 * cross(o, b))
    assert ff.compare({"a": a, "b": same}).differing == {}
    with pytest.raises(ValueError, match=r"loss: '<lambda>, shift 0, code \w{16} \(Python 3\.\d+\)' of 'a', '<lambda>"):
        ff.compare({"a": a, "b": other})
    found = ff.compare({"a": a, "b": other}, across={"loss"})
    assert set(found.differing["loss"]) == {"a", "b"} and len(set(found.differing["loss"].values())) == 2
    one, two = (fisher(ff.losses.custom(values, name="x")) for values in (cross, through(1.0)))
    with pytest.raises(ValueError, match="loss: 'x, shift 0, code"):
        ff.compare({"a": one, "b": two})


def test_results_of_an_older_version_are_compared_by_the_name_of_their_loss():
    new = fisher(cross)
    old = replace(new, provenance=replace(new.provenance, loss_id=None))
    assert ff.compare({"a": old, "b": old}).differing == {} == ff.compare({"a": new, "b": old}).differing
    with pytest.raises(ValueError, match="loss: 'cross, shift 0' of 'a', 'other, shift 0' of 'b'"):
        ff.compare({"a": old, "b": replace(old, provenance=replace(old.provenance, loss="other"))})


def test_a_checkpoint_is_not_resumed_with_another_loss_of_the_same_name(tmp_path):
    fn = ff.functionalize(nn.Linear(3, 4))
    for values in (lambda o, b: cross(o, b), lambda o, b: cross(o, b)):
        ff.token_grams(fn, fn.params, batch(), ff.losses.custom(values), checkpoint=tmp_path)
    with pytest.raises(ValueError, match="what the loss computes"):
        ff.token_grams(fn, fn.params, batch(), ff.losses.custom(lambda o, b: 2 * cross(o, b)), checkpoint=tmp_path)


def test_random_states_and_values_are_left_as_they_were():
    state = torch.get_rng_state()
    weights = nn.Parameter(torch.ones(3))
    version = weights._version
    identity(through(weights))
    assert torch.equal(torch.get_rng_state(), state) and weights._version == version
