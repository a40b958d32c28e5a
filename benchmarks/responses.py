"""Time of replying to 25 scenarios together, against replying to one after the other.

Both use the engine's `generate` on the same loaded model, the built-in scenarios, the model's chat
template and the same token budget; each call opens its own context and reads its own prompt. A model
of about a billion parameters with random weights is made for it: such a model hardly ever ends its
turn, so both generate the whole budget. One after the other is timed on a few scenarios, spread over
all of them, between the batches, and extrapolated to all; the output says on how many.

Replies are compared too: a decode of many sequences rounds differently from a decode of one, so with
random weights, where candidates are close, a few may part ways.

    python benchmarks/responses.py --folder /somewhere/with/2GB
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from random_model import add_model_options, model_for_a_while
from timing import Paired, cpu_seconds, engine_options, finish, options

from loops.engine.chat import prompt_tokens
from loops.engine.generate import Reply, Sampling, generate
from loops.engine.model import load_model
from loops.evaluation.scenarios import read_scenarios

FACTOR = 8.0


def _common(first: Reply, second: Reply) -> float:
    """Return the share of two replies' tokens that comes before they part."""
    pairs = list(zip(first.tokens, second.tokens, strict=False))
    same = next((place for place, (one, other) in enumerate(pairs) if one != other), len(pairs))
    return same / max(1, len(first.tokens), len(second.tokens))


def compare(arguments: argparse.Namespace, path: Path) -> int:
    """Measure and print."""
    sampling = Sampling(max_tokens=arguments.max_tokens)
    with load_model(path, engine_options(arguments.threads)) as model:
        prompts = [prompt_tokens(model, scenario.prompt)
                   for scenario in read_scenarios()[:arguments.scenarios]]
        print(f"{model.n_parameters / 1e6:,.0f} M parameters, {len(prompts)} prompts of "
              f"{sum(map(len, prompts)) / len(prompts):.0f} tokens, {arguments.max_tokens} tokens each, "
              f"{arguments.threads} threads", flush=True)
        generate(model, prompts[:1], Sampling(max_tokens=2))  # the first touch of every page of the file
        chosen = [round(place * (len(prompts) - 1) / max(1, arguments.singles - 1))
                  for place in range(min(arguments.singles, len(prompts)))]
        together: list[float] = []
        alone: list[float] = []
        alone_rates: list[float] = []
        agreement: list[float] = []
        cpu_together: list[float] = []
        cpu_alone: list[float] = []
        made = 0
        for _ in range(arguments.rounds):
            singles, seconds, cpu = [], [], []
            for place in chosen:
                if place == chosen[len(chosen) // 2]:  # in the middle: the same neighbours for both
                    started, used = time.monotonic(), cpu_seconds()
                    replies = generate(model, prompts, sampling)
                    together.append(time.monotonic() - started)
                    cpu_together.append(cpu_seconds() - used)
                started, used = time.monotonic(), cpu_seconds()
                singles += generate(model, [prompts[place]], sampling)
                seconds.append(time.monotonic() - started)
                cpu.append(cpu_seconds() - used)
            alone.append(statistics.mean(seconds) * len(prompts))
            cpu_alone.append(statistics.mean(cpu) * len(prompts))
            made = sum(len(reply.tokens) for reply in replies)
            alone_rates.append(sum(len(reply.tokens) for reply in singles) / sum(seconds))
            agreement += [_common(replies[place], single)
                          for place, single in zip(chosen, singles, strict=True)]
    times = Paired(tuple(together), tuple(alone))
    factors = sorted(1 / ratio for ratio in times.ratios)
    factor = statistics.median(factors)
    cpu_factor = statistics.median(cpu_alone) / statistics.median(cpu_together)
    figures: dict[str, Any] = {
        "cpu_together_s": cpu_together, "cpu_one_after_the_other_s": cpu_alone, "cpu_factor": cpu_factor,
        "together_s": together, "one_after_the_other_s": alone, "factors": factors, "factor": factor,
        "singles_measured": len(chosen), "tokens": made,
        "together_tokens_per_s": made / statistics.median(together),
        "alone_tokens_per_s": statistics.median(alone_rates), "same_share": statistics.mean(agreement)}
    print(f"\ntogether            {statistics.median(together):8.1f} s  "
          f"{figures['together_tokens_per_s']:6.1f} tokens/s"
          f"\none after the other {statistics.median(alone):8.1f} s  "
          f"{figures['alone_tokens_per_s']:6.1f} tokens/s  "
          f"(extrapolated from {len(chosen)} of {len(prompts)})"
          f"\nfactor              {factor:8.1f}    ({factors[0]:.1f} to {factors[-1]:.1f}); "
          f"{cpu_factor:.1f} in processor time"
          f"\nthe same tokens     {figures['same_share']:8.0%}")
    return finish("responses", arguments, figures, factor >= FACTOR,
                  f"{len(prompts)} replies together at least {FACTOR:g} times as fast as one after the other")


def main() -> int:
    """Read the options, make the model and compare."""
    parser = options(__doc__, rounds=2)
    add_model_options(parser, "1B")
    parser.add_argument("--model", type=Path, help="a GGUF to use instead of making one")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--scenarios", type=int, default=25)
    parser.add_argument("--singles", type=int, default=4,
                        help="replies timed alone in each round (default 4)")
    arguments = parser.parse_args()
    if arguments.model is not None:
        return compare(arguments, arguments.model)
    with model_for_a_while(arguments.folder, arguments.size, keep=arguments.keep) as path:
        return compare(arguments, path)


if __name__ == "__main__":
    raise SystemExit(main())
