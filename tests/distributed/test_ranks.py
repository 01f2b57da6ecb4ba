"""Spectra over gloo ranks are those of one process; ranks that differ, fail, hang or are killed are one error."""

import math
import pickle
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from rank import SAME, SIZES, TIMEOUT_S, classifier, in_float32, language_model, main, spectrum_of
from started import ranks_started

import fisherfunc as ff
from fisherfunc.distributed import RanksError, entering
from fisherfunc.distributed.collectives import Everyone
from fisherfunc.gradients.ranks.certificate import _take_part
from fisherfunc.gradients.rows.subsample import sample_coordinates
from fisherfunc.gradients.survey.prepare import prepared
from fisherfunc.surface.ranks import _say


def ran(case, size, folder, started=None):
    """What each of so many ranks found, or the status with which it ended; only the first `started` are started."""
    ended = ranks_started(main, folder, case, size=size, started=started)
    files = [folder / f"{rank}.pt" for rank in range(len(ended))]
    return [
        torch.load(file, weights_only=False) if file.exists() else status
        for file, status in zip(files, ended, strict=True)
    ]


def leaves(tree, path=""):
    """(where, what) of all single values but the metadata."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            if name not in ("metadata", "values"):
                yield from leaves(value, f"{path}/{name}")
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            yield from leaves(value, f"{path}/{index}")
    else:
        yield path, tree


def is_same(value, other):
    """Numbers of one sum in another order: some cancel, so that the seventh digit may differ."""
    if isinstance(value, float) and isinstance(other, float):
        return math.isclose(value, other, rel_tol=1e-6, abs_tol=1e-9)
    return value == other


@pytest.fixture(scope="module")
def over_ranks(tmp_path_factory):
    """{size: what each rank of a group of that size found}."""
    each = ran("same", max(SIZES), tmp_path_factory.mktemp("same"))
    assert all(isinstance(found, dict) for found in each), each
    return {size: [found[size] for found in each[:size]] for size in SIZES}


@pytest.mark.parametrize("name", SAME)
def test_ranks_have_the_result_of_one_process(over_ranks, name):
    alone = spectrum_of(name)
    want = dict(leaves(alone.to_dict()))
    for size, each in over_ranks.items():
        got = dict(leaves(each[0][name]))
        assert want.keys() == got.keys()
        unlike = {k: (want[k], got[k]) for k in want if "condition_number" not in k and not is_same(want[k], got[k])}
        assert not unlike, size
        for label, spectrum in alone.matrices.items():
            tolerance = 1e-12 * float(spectrum.eigenvalues[0]) * spectrum.num_units
            for found in each:
                values = found[name]["values"][label]
                torch.testing.assert_close(values, spectrum.eigenvalues, atol=tolerance, rtol=0)
                assert torch.equal(values, each[0][name]["values"][label])  # every rank has the same bits
        facts = each[0][name]["metadata"]
        assert facts["num_ranks"] == size == len(facts["ranks"])
        assert facts["self_check"]["held"]
        tokens = sum(one["tokens"] for one in facts["ranks"])
        assert tokens == (facts["num_tokens"] if facts["unit"] == "token" else facts["num_sequences"])
        assert facts["batch"] == alone.metadata["batch"] and facts["tokens"] == alone.metadata["tokens"]


def test_ranks_measure_round_off_by_the_grams_of_one_of_them(over_ranks):
    alone = in_float32()
    want = alone.metadata["round_off"]
    assert want["measured"]
    for each in over_ranks.values():
        for found in each:
            assert found["float32"]["metadata"]["round_off"] == want
            assert list(leaves(found["float32"])) == list(leaves(each[0]["float32"]))
            values = found["float32"]["values"]
            for label, spectrum in alone.matrices.items():
                tolerance = 1e-5 * float(spectrum.eigenvalues[0])
                torch.testing.assert_close(values[label], spectrum.eigenvalues, atol=tolerance, rtol=0)


def test_ranks_have_even_shares_and_whole_grams(over_ranks):
    model, batch, loss = language_model()
    fn = ff.functionalize(model)
    want = ff.token_grams(fn, fn.params, batch, loss).grams
    for size, each in over_ranks.items():
        shares = [one["sequences"] for one in each[0]["tied"]["metadata"]["ranks"]]
        assert sum(shares) == 7 and max(shares) - min(shares) <= 2
        few = each[0]["fewer sequences than ranks"]["metadata"]["ranks"]
        assert [one["tokens"] for one in few] == [5] + [0] * (size - 1)
        for name, gram in want.items():
            torch.testing.assert_close(each[-1]["grams"][name], gram, rtol=0, atol=1e-13 * float(gram.abs().max()))


@pytest.mark.parametrize("name", ["tied", "untied, dense"])  # of the others, what is said of tensors is as large
def test_a_plan_predicts_what_ranks_send(over_ranks, name):
    make, options = SAME[name]
    model, batch, loss = make()
    for size, each in over_ranks.items():
        plan = ff.plan(model, batch, loss=loss, ranks=size, calibrate=False, rates={"passes": 1e9}, **options)
        sent = max(one["bytes_sent"] for one in each[0][name]["metadata"]["ranks"])
        assert 0.5 < sent / plan.over_ranks["bytes_sent"] < 2
        share = max(one["tokens"] for one in each[0][name]["metadata"]["ranks"]) / plan.num_units
        assert 1 / size <= plan.over_ranks["share"] <= 1.5 * share
        passes = plan.operations["forward"] + plan.operations["backward"]
        assert math.isclose(plan.over_ranks["seconds"]["passes"], plan.over_ranks["share"] * passes / 1e9)


def test_a_plan_refuses_what_are_no_ranks_or_rates():
    model, batch, loss = classifier()
    with pytest.raises(ValueError, match="ranks expected how many, at least 1, got ranks=0"):
        ff.plan(model, batch, loss=loss, ranks=0)
    with pytest.raises(ValueError, match="rates expected positive numbers by the names"):
        ff.plan(model, batch, loss=loss, ranks=2, rates={"flops": 1e12})


def test_ranks_that_differ_are_one_error_and_a_rank_that_raises_ends_all(tmp_path):
    zero, one = ran("differ", 2, tmp_path)
    for what in ("parameters", "batch", "num_tokens", "seed", "drop_nonfinite"):
        assert zero[what][0] == one[what][0], what
        assert zero[what][0].startswith("ValueError: rank 1 and rank 0 differ in "), zero[what]
        assert what in zero[what][0]
    assert "whole batch" in zero["batch"][0]
    assert one["raised"][0] == "ValueError: stopped"
    assert zero["raised"][0] == "RanksError: rank 1 failed with ValueError: stopped"
    model, batch, loss = language_model()
    want = ff.fisher_spectrum(model, batch, loss=loss).full.eigenvalues
    for found in (zero, one):
        torch.testing.assert_close(found["resumed"], want, rtol=0, atol=1e-12 * float(want[0]) * 50)
        assert torch.equal(found["again"], found["resumed"])
    for found in (zero, one):  # what was done before rank 1 stopped nobody does again, and after the end nothing
        assert found["num_passes"] > 2
        assert found["first"] >= 1 / found["num_passes"] and found["calls"][0] > 1 == found["calls"][1]


def test_a_rank_that_hangs_and_one_that_is_killed_are_named_in_time(tmp_path):
    zero, one, two = ran("lost", 3, tmp_path)
    for found in (zero, one):
        assert found["hung"][0].startswith(
            "RanksError: rank 1 did not come to 'the pieces of a group' within timeout=10 s"
        )
        assert found["killed"][0].startswith("RanksError: rank 2 gave no sign of life for 5 s"), found
        assert found["killed"][1] < 60
    assert zero["hung"][1] < 60
    assert two == -signal.SIGKILL  # it wrote nothing


def test_a_rank_whose_store_is_gone_says_so(tmp_path):
    _, found = ran("orphaned", 2, tmp_path)
    for error, seconds in found:
        assert error.startswith("RanksError: ") and error.endswith(": rank 0 is gone"), found
        assert seconds < 60


class GoneStore:
    """What a store says whose keeper is gone."""

    def __getattr__(self, name):
        raise RuntimeError("Broken pipe")


def test_what_torch_waits_for_ends_where_the_store_is_gone():
    with pytest.raises(RanksError, match=r"store cannot be reached \(Broken pipe\): rank 0 is gone") as found:
        everyone_of(GoneStore(), 1).waited("rows", lambda: time.sleep(5), [2])
    assert found.value.rank == 0
    everyone_of(GoneStore(), 1).fail(1, "failed")  # what it failed with is then raised


def test_a_rank_speaks_though_the_store_is_gone(capsys):
    _say("rank 0 is gone", everyone_of(GoneStore(), 1))
    assert capsys.readouterr().err == "fisherfunc: error: rank 0 is gone\n"


def test_a_value_larger_than_a_store_takes_is_gathered():
    stores = [torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)]
    stores += [torch.distributed.TCPStore("localhost", stores[0].port, is_master=False) for _ in range(2)]
    values = [torch.full((2_500_000,), rank, dtype=torch.float64) for rank in range(3)]

    def both(rank):
        everyone = everyone_of(stores[rank], rank, 30.0)
        return everyone.gathered("large", values[rank]), everyone.gathered("small", rank)

    with ThreadPoolExecutor(3) as threads:
        for large, small in threads.map(both, range(3)):
            assert small == [0, 1, 2] and all(map(torch.equal, large, values))
    assert not stores[0].check(["value/0/1"]) and not stores[0].check(["value/0/1/1"])  # nothing read is kept


def test_ranks_that_gather_other_things_are_told():
    store = torch.distributed.HashStore()
    names = ["memory", "memory", "tokens"]

    def told(rank):
        with pytest.raises(RanksError, match="rank 2 came to 'tokens' when rank 0 came to 'memory'; have all") as found:
            everyone_of(store, rank).gathered(names[rank], None)
        return found.value.rank

    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(told, range(3))) == [2, 2, 2]


def test_rank_0_leaves_last_where_ranks_fail(monkeypatch):
    store = torch.distributed.HashStore()
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr(entering, "standing", lambda ranks: everyone_of(store, ranks.rank))

    def fail(rank):
        with pytest.raises(ValueError, match="stopped"), entering.together(everyone_of(store, rank).ranks):
            time.sleep(0.3 * rank)
            raise ValueError("stopped")
        return store.add("left", 0)

    with ThreadPoolExecutor(3) as threads:
        assert next(threads.map(fail, range(3))) == 3  # when rank 0 has left


def test_a_rank_without_rows_adds_the_kept_columns_to_a_check():
    params = {"w": torch.ones(3, 4).double(), "b": torch.ones(3).double()}
    coordinates = sample_coordinates({"w": 12, "b": 3}, {"full": ["w", "b"]}, max_coordinates=5)
    work = SimpleNamespace(params=params, nature=SimpleNamespace(precision=torch.float64))
    added, products = [], []
    across = SimpleNamespace(gradient=added.append, sums=lambda *given: products.append(given))
    _take_part({"full": torch.zeros(0, 0).double()}, work, across, 1 << 20, coordinates)
    want = {name: torch.zeros(len(coordinates.index[name])).double() for name in params}
    assert sum(map(len, want.values())) == 5
    torch.testing.assert_close(added, [want])
    assert [[tensor.numel() for tensor in given] for given in products] == [[2, 0]]


def everyone_of(store, rank, timeout=120.0):
    ranks = ff.distributed.Ranks(rank=rank, size=3, timeout=timeout)
    return Everyone(ranks=ranks, store=store, broken=store)


class Counted(torch.nn.Linear):
    """A classifier that counts the samples it is run on, by thread."""

    seen: ClassVar[Counter] = Counter()

    def forward(self, inputs):
        self.seen[threading.get_ident()] += len(inputs)
        return super().forward(inputs)


@pytest.mark.parametrize("count", [7, 60])
def test_ranks_find_the_tokens_once_between_them(count):
    """Each runs its share; of few sequences, which would not meet in batches, rank 0 runs all."""
    torch.manual_seed(0)
    model, batch = Counted(4, 3).double(), (torch.randn(count, 4).double(), torch.randint(3, (count,)))
    store = torch.distributed.HashStore()

    def found(everyone):
        fn, thread = ff.functionalize(model), threading.get_ident()
        before = Counted.seen[thread]
        ready = prepared(fn, fn.params, batch, ff.losses.classification(), everyone=everyone)
        return ready.work.tokens, Counted.seen[thread] - before

    want, alone = found(None)
    with ThreadPoolExecutor(3) as threads:
        each = list(threads.map(found, [everyone_of(store, rank) for rank in range(3)]))
    for tokens, _ in each:
        torch.testing.assert_close(tokens.columns, want.columns, rtol=0, atol=1e-14)
    runs = [run for _, run in each]
    if count == 7:
        assert runs == [alone, 0, 0]
    else:  # beside its share each runs one of it by itself, and rank 0 the largest again, before and after
        assert sum(runs) <= alone + 3 and max(runs) <= alone / 3 + 4 < alone


def test_the_end_of_a_chain_of_waiting_ranks_is_named():
    store = torch.distributed.HashStore()
    store.set("waits/1", pickle.dumps(("factors of head", [2])))  # rank 2 neither waits nor comes
    with pytest.raises(RanksError, match=r"rank 2 did not come to 'factors of head' within timeout=0\.5 s"):
        everyone_of(store, 0, 0.5).waited("rows", lambda: time.sleep(5), [1])
    with pytest.raises(RanksError, match="rank 2 did not come to 'factors of head'"):  # the others have it from there
        everyone_of(store, 1).gathered("tokens", None)


def test_a_rank_without_a_sign_of_life_is_missed_before_the_timeout():
    store = torch.distributed.HashStore()
    for rank in (1, 2):
        store.add(f"beat/{rank}", 1)
    begin = time.monotonic()
    with pytest.raises(RanksError, match="rank 1 gave no sign of life for 1 s"):
        everyone_of(store, 0, 2.0).gathered("tokens", None)
    assert time.monotonic() - begin < 2.0


def test_what_torch_says_of_a_lost_connection_is_told_with_the_rank():
    store = torch.distributed.HashStore()

    def broken():
        raise RuntimeError("Connection closed by peer [127.0.0.1]:1234")

    with pytest.raises(RanksError, match=r"rank 2 was lost at 'rows' \(RuntimeError: Connection closed") as found:
        everyone_of(store, 0).waited("rows", broken, [2])
    assert found.value.rank == 2 and isinstance(found.value.__cause__, RuntimeError)


def test_a_rank_that_never_comes_is_named(tmp_path):
    (found,) = ran("start", 2, tmp_path, started=1)
    assert found["error"] == f"rank 1 did not come to 'the start' within timeout={TIMEOUT_S:g} s"


def test_a_process_by_itself_is_one_rank():
    model, batch, loss = classifier()
    here = ff.distributed.ranks()
    assert (here.rank, here.size, here.group) == (0, 1, None)
    alone = ff.fisher_spectrum(model, batch, loss=loss)
    found = ff.fisher_spectrum(model, batch, loss=loss, ranks=here)
    torch.testing.assert_close(found.full.eigenvalues, alone.full.eigenvalues, rtol=0, atol=1e-14)
    assert found.metadata["num_ranks"] == 1


def test_what_are_no_ranks_is_refused():
    model, batch, loss = classifier()
    with pytest.raises(TypeError, match=r"ranks expected those of ff\.distributed"):
        ff.fisher_spectrum(model, batch, loss=loss, ranks=2)
    with pytest.raises(ValueError, match="timeout expected seconds above 0"):
        ff.distributed.ranks(timeout=0)


def test_a_loader_that_is_divided_among_ranks_is_refused():
    model, (inputs, targets), loss = classifier()
    data = torch.utils.data.TensorDataset(inputs, targets)
    sampler = torch.utils.data.DistributedSampler(data, num_replicas=2, rank=0, shuffle=False)
    loader = torch.utils.data.DataLoader(data, batch_size=4, sampler=sampler)
    with pytest.raises(ValueError, match="DistributedSampler"):
        ff.fisher_spectrum(model, loader, loss=loss, ranks=ff.distributed.ranks())
