"""Plain `generate` with a prefix that is loaded instead of computed.

    python docs/examples/transformers_generate.py [MODEL]

MODEL is a name or a folder as `from_pretrained` takes it; without one, a tiny model of random
weights shows the same. Needs a running daemon to be of use, and runs without one.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from kvstore.client.transformers import PrefixStore

TEXT = "The store keeps what a model has computed, so that nobody computes it twice. " * 20


def model_and_prompt(name: str | None) -> tuple[Any, torch.Tensor]:
    """The model, and the tokens of one prompt, [1, tokens]."""
    if name is not None:
        tokens = AutoTokenizer.from_pretrained(name)(TEXT, return_tensors="pt").input_ids
        return AutoModelForCausalLM.from_pretrained(name).eval(), tokens
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=256, intermediate_size=512, num_hidden_layers=4
    )
    config.eos_token_id = None
    model = LlamaForCausalLM(config).eval()
    return model, torch.tensor([list(TEXT.encode())])


def answer(model: Any, store: PrefixStore, prompt: torch.Tensor) -> torch.Tensor:
    """The prompt and its continuation; what was computed for it is there for the next."""
    cache, known = store.load(prompt)
    began = time.perf_counter()
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        past_key_values=cache,
        max_new_tokens=16,
        do_sample=False,
        return_dict_in_generate=True,
    )
    seconds = time.perf_counter() - began
    saved = store.save(output.sequences, output.past_key_values)
    print(f"{known} of {prompt.shape[1]} tokens loaded, {seconds:.2f} s to generate, {saved}")  # noqa: T201
    sequences: torch.Tensor = output.sequences
    return sequences


def main(name: str | None = None) -> None:
    """One prompt twice: the second time it is known."""
    model, prompt = model_and_prompt(name)
    with PrefixStore(model) as store:
        first, second = (answer(model, store, prompt) for _ in range(2))
        print("the same tokens:", torch.equal(first, second))  # noqa: T201
        if store.health.down:
            print("computed without the store:", store.health.down)  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:2])
