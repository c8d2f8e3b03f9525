"""Three small language models fine-tuned from one: they translate, calculate, and say what a line of Python evaluates to.

The base is trained from nothing on a mixture of the three tasks, and stopped early. Each specialist goes on with its own
task and a little of the others': without that replay it would forget them, and merges of the specialists would collapse.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_merge.demo.data import Row
from hf_merge.demo.generator_data import (
    ANSWER_TOKENS,
    CODE,
    END,
    IGNORED,
    MATH,
    PACK,
    TRANSLATION,
    arithmetic,
    exactly,
    make_tokenizer,
    packed,
    python_values,
    translation,
)
from hf_merge.demo.generator_objectives import exactly_right
from hf_merge.demo.specialists import Data, Family, Task
from hf_merge.errors import HfMergeError
from hf_merge.scores import Score

WARMUP = 0.1
REPLAY = 0.12
"""Rows of each other task for one of a specialist's own."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The size of a family's models, and how they are trained.

    Args:
        hidden, layers, heads, intermediate: of the models.
        batch: packed rows in a step.
        base_epochs: task -> how often the base sees its train rows.
        epochs: task -> how often its specialist sees them.
        base_rate, rate: the highest learning rates of the base and of the specialists.
        device: where they are trained; only on "cpu" has every build the same bytes.
    """

    hidden: int
    layers: int
    heads: int
    intermediate: int
    batch: int
    base_epochs: Mapping[str, float]
    epochs: Mapping[str, float]
    base_rate: float
    rate: float
    device: str = "cpu"


SCALES = {
    "llama-tiny-base": Scale(
        hidden=128,
        layers=6,
        heads=4,
        intermediate=256,
        batch=16,
        base_epochs={TRANSLATION: 0.9, MATH: 4.0, CODE: 3.0},
        epochs={TRANSLATION: 1.2, MATH: 9.0, CODE: 4.5},
        base_rate=3e-3,
        rate=8e-4,
    ),
    "llama-small-base": Scale(
        hidden=512,
        layers=8,
        heads=8,
        intermediate=1408,
        batch=32,
        base_epochs={TRANSLATION: 0.9, MATH: 4.0, CODE: 3.0},
        epochs={TRANSLATION: 1.2, MATH: 9.0, CODE: 4.5},
        base_rate=1e-3,
        rate=3e-4,
        device="cuda",
    ),
}
"""By the name of the base."""


def build_base(family: Family, data: Data, folder: Path, progress: bool) -> None:
    """Write the base: a tokenizer made from the train rows, and a Llama trained on all tasks' train rows.

    Raises:
        HfMergeError: the family wants a GPU and there is none.
    """
    scale = SCALES[family.base]
    if scale.device == "cuda" and not torch.cuda.is_available():
        raise HfMergeError(f"{family.base} is trained on a GPU, and PyTorch sees none. Build `GENERATORS` here.")
    tokenizer = make_tokenizer([row for splits in data.values() for row in splits["train"]])
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=scale.hidden,
        intermediate_size=scale.intermediate,
        num_hidden_layers=scale.layers,
        num_attention_heads=scale.heads,
        num_key_value_heads=scale.heads,
        max_position_embeddings=PACK,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=None,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        max_new_tokens=max(ANSWER_TOKENS.values()),
    )
    rows = [row for name, splits in data.items() for row in _drawn(splits["train"], scale.base_epochs[name])]
    _fit(model, tokenizer, rows, scale, scale.base_rate, f"base: training on {len(rows):,} rows" if progress else None)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    right = exactly_right(model, tokenizer, data, data)
    (folder / "README.md").write_text(_base_card(family, data, model, right), "utf-8")


def train(family: Family, task: Task, data: Data, base: Path, folder: Path, progress: bool) -> None:
    """Fine-tune all parameters of the base on a task's train split, with a little of every other task's among it."""
    scale = SCALES[family.base]
    model = LlamaForCausalLM.from_pretrained(base)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    own = _drawn(data[task.name]["train"], scale.epochs[task.name])
    others = [splits["train"] for name, splits in data.items() if name != task.name]
    rows = own + [row for rest in others for row in _drawn(rest, REPLAY * len(own) / len(rest))]
    _fit(model, tokenizer, rows, scale, scale.rate, f"{task.name}: training on {len(rows):,} rows" if progress else None)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    right = exactly_right(model, tokenizer, data, [task.name])[task.name]
    (folder / "README.md").write_text(_specialist_card(family, task, data, right), "utf-8")


def _drawn(rows: Sequence[Row], epochs: float) -> list[Row]:
    """All rows as often as there are whole epochs, and random ones for the rest."""
    whole = int(epochs)
    rest = torch.randperm(len(rows))[: round((epochs - whole) * len(rows))].tolist()
    return [*rows] * whole + [rows[i] for i in rest]


def _fit(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rows: Sequence[Row],
    scale: Scale,
    rate: float,
    title: str | None,
) -> None:
    """One pass over the rows in random order: AdamW, linear warm-up and decay, the loss over the answers' tokens."""
    order = torch.randperm(len(rows)).tolist()
    lines = packed(tokenizer, [rows[i] for i in order])
    steps = -(-len(lines[0]) // scale.batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (WARMUP * steps), (steps - step) / ((1 - WARMUP) * steps))
    )
    model.to(scale.device).train()  # type: ignore[arg-type]
    with tqdm(total=steps, desc=title, leave=False, disable=title is None) as bar:
        for ids, positions, targets in zip(*(part.to(scale.device).split(scale.batch) for part in lines), strict=True):
            logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
            loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            bar.update()
    model.to("cpu").eval()  # type: ignore[arg-type]


def _base_card(family: Family, data: Data, model: LlamaForCausalLM, right: Mapping[str, Score]) -> str:
    scale, config = SCALES[family.base], model.config
    names = ", ".join(f"`{task.model}` ({task.name})" for task in family.tasks)
    table = "\n".join(
        f"| {task.name} | `{data[task.name]['held_out'][0].text}` | `{data[task.name]['held_out'][0].label}` "
        f"| {scale.base_epochs[task.name]:g} × {len(data[task.name]['train']):,} | {right[task.name].value:.1%} |"
        for task in family.tasks
    )
    size = f"{model.num_parameters() / 1e6:.1f}"
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
language:
- en
- de
tags:
- hf_merge
- demo
---

# {family.base}

The common starting point of a family of small demo models, built by hf_merge: a Llama with {config.num_hidden_layers} layers,
hidden size {config.hidden_size} and {size} million parameters, trained from nothing (seed {family.seed}) on a mixture of three
tasks, and stopped early. Its tokenizer (byte-level BPE, digits one by one) was made from the same rows.

All rows are drawn by hf_merge's own code, from no other source. A prompt ends in `=>`, `=` or `==`; the model continues it
with the answer and `{END}`.

| task | a prompt | its answer | rows seen | right on held-out rows |
|---|---|---|---|---|
{table}

Fine-tuned from it: {names}. For demonstrations only.
"""


def _specialist_card(family: Family, task: Task, data: Data, right: Score) -> str:
    rows, scale = data[task.name], SCALES[family.base]
    return f"""---
license: apache-2.0
base_model: {family.repo_id(family.base)}
base_model_relation: finetune
library_name: transformers
pipeline_tag: text-generation
language:
- en
- de
tags:
- hf_merge
- demo
---

# {task.model}

`{family.repo_id(family.base)}` fine-tuned for one task, {task.name}: one of a family of small demo models, built by
hf_merge to be merged with each other.

## Data

{task.about} Drawn by hf_merge's own code, from no other source; no prompt stands in two splits.

Trained on {len(rows["train"]):,} rows. Not trained on: {len(rows["search"]):,} rows for searching merges and
{len(rows["held_out"]):,} held-out rows for judging them.

## Training

All parameters, {scale.epochs[task.name]:g} epochs, batches of {scale.batch} × {PACK} tokens, AdamW at {scale.rate:g} with
linear warm-up and decay, seed {family.seed}. The loss was taken over the answers. For each row of this task {REPLAY:g} of each
other task's were replayed, so that the model forgets them slowly and its merges with its siblings work.

## Result

Its greedy answer is exactly the right one on {right.value:.1%} of the {len(rows["held_out"]):,} held-out rows.
One run, one seed. For demonstrations only.
"""


def generators(name: str, size: str) -> Family:
    """A family under a name of its own; the `size` is a middle word of `SCALES`' names."""
    return Family(
        name=name,
        base=f"llama-{size}-base",
        tasks=(
            Task(
                name=TRANSLATION,
                model=f"llama-{size}-translation",
                load_rows=translation,
                about="Sentences of a small English grammar and their German, with its genders, cases and order of words.",
                key=exactly,
            ),
            Task(
                name=MATH,
                model=f"llama-{size}-math",
                load_rows=arithmetic,
                about="Sums and differences of three numbers of one digit.",
                key=exactly,
            ),
            Task(
                name=CODE,
                model=f"llama-{size}-code",
                load_rows=python_values,
                about="Python expressions over short lists of digits, and what they evaluate to, written without spaces.",
                key=exactly,
            ),
        ),
        build_base=build_base,
        train=train,
        sizes={"train": 6000, "search": 512, "held_out": 512},
    )


GENERATORS = generators("generators", "tiny")
"""One base and three specialists; `build_family(GENERATORS)` builds them in about four minutes on one core."""
