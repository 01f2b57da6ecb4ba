"""`fisherfunc check`: on one screen, what a run on a model and a text would cover and use, before any of it is run."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from textwrap import fill
from typing import Any

import click

from fisherfunc.surface.boundary import guarded
from fisherfunc.surface.commands.format_options import FORMAT, as_options
from fisherfunc.surface.visible import escaped_json, visible

HELP = """Say what a run on MODEL would cover and use, and what to look at before: one screen, and no pass over tokens.

Which parameters are in it and which are left out, what of the model's structure is used (is it causal, can sequences
run together, is there an output layer) and why not, how gradients are held, what the dtype loses, whether the text is
long enough, and whether a window begins with two start tokens.

\b
Examples:
  fisherfunc check gpt2 --text book.txt
  fisherfunc check ./my-adapter --dtype bfloat16
"""
LOSES = {
    "float32": "eigenvalues are resolved down to some 1e-5 of the largest",
    "float64": "eigenvalues are resolved down to some 1e-14 of the largest, where the model computes in float64 inside",
    "bfloat16": "eigenvalues are resolved down to some 10 % of the largest; traces and leading ones are right to 1 %",
}
"""As seen on the embedded model; a run measures its own resolution."""
FEW = 64
"""Tokens that the structure is looked at with."""


@click.command(help=HELP, short_help="What a run on a model would cover and use.")
@click.argument("model", required=False, metavar="[MODEL]")
@click.option("--text", type=click.Path(exists=True, dir_okay=False), metavar="FILE", help="Text.")
@click.option("--tokens", "num_tokens", type=click.IntRange(min=1), metavar="N", help="How many are wanted.")
@click.option("--context", type=click.IntRange(min=1), metavar="S", help="Positions of a window.")
@click.option("--dtype", type=click.Choice(list(LOSES)), default="float32", show_default=True, help="Of the pass.")
@as_options(*FORMAT, click.option("--debug", is_flag=True, help="Show the traceback of an error."))
@guarded
def check(form: str, **options: Any) -> None:
    """Print the findings."""
    from fisherfunc.surface.terminal import console, hush

    hush()
    if form == "json":
        click.echo(escaped_json(json.dumps(dict(findings(**options)), indent=1, ensure_ascii=False)))
        return
    terminal = console()
    for name, found in findings(**options):
        line = visible(f"{name:<12}{found}")
        click.echo(fill(line, terminal.width, subsequent_indent=" " * 12) if terminal.is_terminal else line)


def findings(
    *, model: str | None, text: str | None, num_tokens: int | None, context: int | None, dtype: str
) -> Iterator[tuple[str, str]]:
    """Find what stands on the screen, a line each: (what, finding).

    Args:
        model: A folder or a hub id; the embedded model where None.
        text: A file; the embedded text where None.
        num_tokens: How many tokens are wanted.
        context: Positions of a window.
        dtype: Of the pass.

    Raises:
        ValueError: If the text, the model or an option cannot be used.
        OSError: If a file cannot be read.
    """
    from fisherfunc.models.functionalize import functionalize
    from fisherfunc.models.huggingface import num_valid_tokens
    from fisherfunc.pipeline.plan import plan
    from fisherfunc.surface.jobs.job import DEFAULT_TOKENS, Job, loaded_model, pass_options, windows_of

    job = Job(model=model, text=text, context=context, dtype=dtype)
    loaded, batches, _, facts = loaded_model(job)
    wanted, size = num_tokens or DEFAULT_TOKENS, facts.context or 0
    there = num_valid_tokens(windows_of(replace(job, num_tokens=wanted))(loaded, size).batches)
    yield "model", f"{job.name}, {type(loaded.model).__name__}, {loaded.task}"
    fn = functionalize(loaded.model)
    yield from coverage(loaded.model, fn)
    short = f"; the text is too short for {wanted:,}" if there < wanted else ""
    yield "text", f"{facts.text}, {min(there, wanted):,} tokens in windows of {size} positions{short}"
    if loaded.task == "causal_lm":
        start = " ".join(facts.window_start or ())
        yield "start", f"windows begin with {start}" if start else "windows have no start token"
        twice = loaded.tokenizer.bos_token_id
        if twice is not None and any(bool((batch["input_ids"][:, :2] == twice).all(dim=1).any()) for batch in batches):
            yield "look at", "a window begins with two start tokens: take one out of the text, or --bos never"
    yield "dtype", f"{dtype}: {LOSES[dtype]}"
    options = {**pass_options(job, loaded), "num_tokens": FEW}
    found = plan(loaded.model, batches, **options, calibrate=False)
    yield from exploits(found)
    routes = Counter(cost.route for cost in found.parameters.values())
    yield "route", found.route + (f", as {found.reason}" if found.reason else "")
    yield "gradients", ", ".join(f"{count} by {route}" for route, count in routes.most_common())
    whys = {cost.why for cost in found.parameters.values() if cost.route == "autograd"}
    if whys:
        yield "autograd", "; ".join(sorted(whys))


def exploits(found: Any) -> Iterator[tuple[str, str]]:
    """Find what of the model's structure the factored route would use, and why not where it would not.

    Args:
        found: The plan.
    """
    structure = getattr(found.of_route, "structure", None)
    if structure is None:
        return
    whys = {name: f" ({why})" if why else "" for name, why in structure.refused.items()}
    whole = "no: a position sees what comes after it, so that each pass takes the whole sequence"
    without = f"not used{whys['prefixes']}" if "prefixes" in whys else whole
    yield "causal", "yes: a token needs no more than its prefix" if structure.causal else without
    apart = "no: they run one at a time"
    yield "separable", "yes: sequences run together" if structure.stacked else apart + whys.get("stacks", "")
    last = "none: the losses are no function, place by place, of a last linear map"
    head = structure.head and f"{structure.head[0]}: passes begin below it, from cotangents in closed form"
    yield "output", head or last
    if not found.of_route.segments.ends:
        yield "segments", "one: the model runs as a whole" + whys.get("segments", "")


def coverage(model: Any, fn: Any) -> Iterator[tuple[str, str]]:
    """Find how many parameters are in F, which are left out, and which are one under several names.

    Args:
        model: The module.
        fn: The same as a function.
    """
    inside, frozen = sum(p.numel() for p in fn.params.values()), sum(p.numel() for p in fn.frozen.values())
    yield "parameters", f"{inside:,} of {inside + frozen:,} in F ({inside / (inside + frozen):.2%})"
    if fn.frozen:
        names = list(fn.frozen)
        yield "left out", f"{len(names)} frozen tensors, {names[0]} … {names[-1]}"
    once = {name for name, _ in model.named_parameters()}
    again = [name for name, _ in model.named_parameters(remove_duplicate=False) if name not in once]
    if again:
        yield "tied", f"{', '.join(again)}: one parameter with another, whose gradients add up"
