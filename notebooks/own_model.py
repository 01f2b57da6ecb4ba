# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A model of your own
#
# What does it take to have the spectrum of a model that this package has never seen? Three of them: a module written here, a
# convolutional network on real digits, and a language model of which a LoRA adapter alone is trained.

# %%
import warnings

import matplotlib.pyplot as plt
import torch
from peft import LoraConfig, get_peft_model
from sklearn.datasets import load_digits
from torch import nn
from transformers.utils import logging

import fisherfunc as ff
from fisherfunc import assets
from fisherfunc.models.huggingface import load, text_batches

warnings.filterwarnings("ignore", category=FutureWarning)  # of peft's use of Transformers
logging.disable_progress_bar()
torch.manual_seed(0);

# %% [markdown]
# ## A plain module
#
# A layer that is called twice, and a parameter that is no layer's. Nothing is registered; the run holds itself against an ordinary
# backward pass, and so would see what it had missed.


# %%
class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(16, 16)
        self.gain = nn.Parameter(torch.ones(16))
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.inner(self.inner(x).tanh()) * self.gain.sigmoid())


model, batch = Gated(), (torch.randn(200, 16), torch.randint(3, (200,)))
plain = ff.fisher_spectrum(model, batch, blocks=ff.by_parameter)
plain

# %% [markdown]
# The first row of its Gram matrix by hand, with nothing of this package:

# %%
fn = ff.functionalize(model)
gram = ff.token_grams(fn, fn.params, batch, ff.losses.classification()).block()
rows = []
for n in range(3):
    loss = nn.functional.cross_entropy(model(batch[0][n : n + 1]), batch[1][n : n + 1])
    rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
by_hand = torch.stack(rows).double()
torch.testing.assert_close(gram[:3, :3], by_hand @ by_hand.T, rtol=1e-4, atol=1e-6)
(by_hand @ by_hand.T)[0].tolist()

# %% [markdown]
# ## A convolutional network on digits
#
# 1,797 images of 8 × 8 pixels (scikit-learn). Before and after training, empirical and true Fisher.

# %%
data = load_digits()
images, labels = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)
network = nn.Sequential(
    nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
    nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 16, 10),
)  # fmt: skip
probe = (images[:300], labels[:300])


def both():
    return {
        "empirical": ff.fisher_spectrum(network, probe, population=False),
        "true": ff.fisher_spectrum(network, probe, targets=ff.targets.all_classes(), population=False),
    }


before = both()
optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
for _ in range(60):
    optimizer.zero_grad()
    nn.functional.cross_entropy(network(images[300:]), labels[300:]).backward()
    optimizer.step()
after = both()
accuracy = (network(probe[0]).argmax(1) == probe[1]).float().mean().item()
print(f"accuracy on the probe after training: {accuracy:.1%}")
print(f"{'':24} {'λ_max':>9} {'trace':>9} {'eff. rank':>9}")
for when, results in (("before", before), ("after", after)):
    for which, result in results.items():
        full = result.full
        values = (ff.metrics.largest(full), ff.metrics.trace(full), ff.metrics.effective_rank(full))
        print(f"{when:7} {which:16}", *(f"{value.item():9.2f}" for value in values))

# %%
figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
ff.plots.spectrum(after["empirical"], ax=axes[0])
ff.plots.spectrum(after["true"], ax=axes[1])
axes[0].set_title("empirical, after training")
axes[1].set_title("true, after training");
# %% [markdown]
# ## A LoRA adapter
#
# Frozen parameters are left out, as gradients of training would be; what is in F is counted.

# %%
loaded = load(assets.checkpoint("final"))
text = assets.sample_text().read_text(encoding="utf-8")
batches = text_batches(loaded.tokenizer, text, task=loaded.task, context=32, num_tokens=124)
adapted = get_peft_model(loaded.model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
lora = ff.fisher_spectrum(adapted, batches, loss=ff.losses.causal_lm())
frozen = lora.metadata["num_frozen_params"]
print(f"{lora.full.num_params:,} parameters in F, {frozen:,} frozen")
lora

# %% [markdown]
# ## A head of attention
#
# `divide_heads` makes the heads of the attention parameters of their own: a block for each.

# %%
whole = load(assets.checkpoint("final")).model
heads = ff.fisher_spectrum(ff.divide_heads(whole), batches, loss=ff.losses.causal_lm(), blocks=ff.by_head)
traces = {label: ff.metrics.trace(part).item() for label, part in heads.blocks.items() if ".head." in label}
for layer in range(4):
    print(f"layer {layer}, trace by head:", *(f"{traces[f'layer.{layer}.head.{h}']:8.2f}" for h in range(4)))

# %% [markdown]
# ## What was found
#
# - A module goes in as it is. A weight that is used twice has one gradient, the sum of both uses, and a parameter of the module's own is a
#   block like others; by hand the same Gram comes out.
# - On digits the loss is inferred (`classification`), an image is a token, and convolutions are factored like linear maps. Training to
#   94 % makes traces 18 to 27 times as large as before. The empirical and the true Fisher agree at the start, where predictions are near
#   chance, and not after: by then the empirical trace is two thirds of the true one.
# - Of a LoRA adapter 5,376 parameters are in F and 504,672 frozen ones are not, which the result says.
# - The heads of one layer need not be alike: in layer 0 the last has three times the trace of the first; in the others they differ by less
#   than two.
