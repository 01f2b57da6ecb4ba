"""No global generator, and no setting of the process, is another after code of the user's has drawn from it or run."""

import random
import time
from threading import Event, Thread

import numpy as np
import pytest
import torch
from jaxtyping import config as type_checks
from torch import nn
from torch.backends import cuda, mkldnn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

import fisherfunc as ff
from fisherfunc.runtime import draws

DRAWS = {
    "torch": lambda: torch.rand(()).item(),
    "Python": lambda: random.random(),
    "NumPy": lambda: np.random.rand(),
}


def state():
    """Of the generators, and of the settings that a call changes."""
    settings = mkldnn.enabled, cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled()
    return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state()), settings


@pytest.fixture(autouse=True)
def unchecked():
    type_checks.update("jaxtyping_disable", True)  # checks of types draw from Python's generator


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)).double()


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_a_loss_draws_the_same_in_each_call_and_moves_no_generator(model, draw):
    x, y = torch.randn(5, 2).double(), torch.tensor([0, 1, 2, 0, 1])

    def drawn(output, batch):
        return functional.cross_entropy(output, batch[-1], reduction="none") * (1 + draw())

    before = state()
    got = ff.fisher_spectrum(model, (x, y), loss=drawn, blocks=ff.whole).full.eigenvalues
    assert state() == before
    factors = got / ff.fisher_spectrum(model, (x, y), blocks=ff.whole).full.eigenvalues
    assert 1 < factors[0] < 4  # (1 + u)² for one number u
    torch.testing.assert_close(factors, factors[:1].expand_as(factors), rtol=1e-9, atol=0)


class Noisy(Dataset):
    """Samples with noise, as augmented images have it; also an iterable of batches."""

    def __init__(self, draw):
        self.draw = draw

    def __len__(self):
        return 6

    def __getitem__(self, n):
        return torch.tensor([n + self.draw(), 1.0]).double(), n % 3


class Batches:
    """The same one by one, in an order that is drawn where iteration begins."""

    def __init__(self, draw):
        self.samples = Noisy(draw)

    def __iter__(self):
        first = int(6 * self.samples.draw())
        found = [self.samples[(first + n) % 6] for n in range(6)]
        return iter([(x[None], torch.tensor([y])) for x, y in found])


@pytest.mark.parametrize("kind", [lambda draw: DataLoader(Noisy(draw), batch_size=2), Batches])
@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_data_that_are_read_move_no_generator(model, kind, draw):
    before = state()
    first = ff.fisher_spectrum(model, kind(draw), num_tokens=4).full.eigenvalues
    assert state() == before
    torch.testing.assert_close(ff.fisher_spectrum(model, kind(draw), num_tokens=4).full.eigenvalues, first)


def test_calls_of_several_threads_leave_the_process_as_it_was():
    begun = Event()

    class Slow(nn.Module):
        def __init__(self, seconds):
            super().__init__()
            self.recurrent, self.seconds = nn.GRU(2, 3, batch_first=True), seconds

        def forward(self, x):
            begun.set()
            time.sleep(self.seconds)
            return self.recurrent(x)[0]

    def run(model):
        fn = ff.functionalize(model)
        fn.apply(fn.params, (torch.zeros(1, 2, 2), torch.zeros(1)))

    models = Slow(0.2), Slow(0.6)
    before = state()
    first, second = (Thread(target=run, args=(model,)) for model in models)
    first.start()
    begun.wait()
    second.start()  # while the first runs, and it ends after that
    first.join()
    second.join()
    assert state() == before


def test_a_data_set_read_while_a_model_runs_elsewhere_leaves_the_users_generators():
    inside, entered, left = Event(), Event(), Event()

    def model_runs():
        with draws.same_draws(torch.device("cpu")):
            inside.set()
            entered.wait(0.5)  # the other one waits for this to end, or has taken what the model draws from

    def data_set_is_read():
        with draws.put_back():
            entered.set()
            left.wait(10)

    torch.manual_seed(7)
    before = state()
    threads = [Thread(target=model_runs), Thread(target=data_set_is_read)]
    threads[0].start()
    assert inside.wait(10)
    threads[1].start()
    threads[0].join()
    left.set()
    threads[1].join()
    assert state() == before
