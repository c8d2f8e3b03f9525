"""Rows of three tasks with free answers, drawn from a seed alone (English to German, mental arithmetic, Python values), and
the tokens that models read of them."""

import random
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from hf_merge.demo.data import Row

TRANSLATION, MATH, CODE = "translation", "math", "code"
ANSWER_TOKENS = {TRANSLATION: 28, MATH: 4, CODE: 14}
"""At least those of the longest answers, with their end."""
ROWS = 9000
"""Drawn for each task, duplicates included."""
VOCABULARY = 512
PAD, END = "<pad>", "<end>"
PACK = 96
"""Tokens of a line that rows are packed into."""
IGNORED = -100
"""The target of a token that the loss leaves out."""

_ARTICLES = {
    ("the", "nominative"): {"m": "der", "f": "die", "n": "das"},
    ("the", "accusative"): {"m": "den", "f": "die", "n": "das"},
    ("a", "nominative"): {"m": "ein", "f": "eine", "n": "ein"},
    ("a", "accusative"): {"m": "einen", "f": "eine", "n": "ein"},
}
_ENDINGS = {
    ("the", "nominative"): {"m": "e", "f": "e", "n": "e"},
    ("the", "accusative"): {"m": "en", "f": "e", "n": "e"},
    ("a", "nominative"): {"m": "er", "f": "e", "n": "es"},
    ("a", "accusative"): {"m": "en", "f": "e", "n": "es"},
}
_NOUNS = {
    "m": "dog Hund, man Mann, king König, bird Vogel, fish Fisch, tree Baum, friend Freund, teacher Lehrer",
    "f": "cat Katze, woman Frau, queen Königin, mouse Maus, cow Kuh, flower Blume, sister Schwester, city Stadt",
    "n": "child Kind, horse Pferd, girl Mädchen, house Haus, book Buch, animal Tier, pig Schwein, ship Schiff",
}
_ADJECTIVES = (
    "old alt, small klein, big groß, young jung, red rot, beautiful schön, fast schnell, quiet still, poor arm, rich reich, "
    "new neu, strange fremd"
)
_VERBS = (
    "sees sieht, finds findet, hears hört, loves liebt, seeks sucht, knows kennt, buys kauft, draws malt, follows verfolgt, "
    "greets grüßt, misses vermisst, visits besucht"
)
_ADVERBS = "today heute, often oft, now jetzt, here hier, never nie, soon bald"

_LISTS = ("sorted({})", "{}[::-1]", "{}[1:]", "{}[:2]", "({}+[{}])")
_NUMBERS = ("max({})", "min({})", "len({})", "{}[0]", "{}[-1]", "sum({})")


def exactly(text: str) -> str:
    """The text itself: prompts that differ in a digit or a bracket are different prompts."""
    return text


def translation() -> list[Row]:
    """English sentences of a small grammar, and their German: gender, case, endings and the order of words change."""
    draw = random.Random("translation")
    nouns = [(*pair, gender) for gender, words in _NOUNS.items() for pair in _pairs(words)]
    adjectives, verbs, adverbs = _pairs(_ADJECTIVES), _pairs(_VERBS), _pairs(_ADVERBS)

    def phrase(case: str) -> tuple[str, str]:
        article = draw.choice(("the", "a"))
        english, german, gender = draw.choice(nouns)
        quality, stem = draw.choice(adjectives) if draw.random() < 0.6 else ("", "")
        ending = _ENDINGS[article, case][gender] if stem else ""
        return _joined(article, quality, english), _joined(_ARTICLES[article, case][gender], stem + ending, german)

    rows = []
    for _ in range(ROWS):
        subject, thing = phrase("nominative"), phrase("accusative")
        verb, when = draw.choice(verbs), draw.choice(adverbs) if draw.random() < 0.5 else ("", "")
        english = _joined(when[0], subject[0], verb[0], thing[0])
        # In German the verb stands second, whatever comes first.
        german = _joined(when[1], verb[1], subject[1], thing[1]) if when[1] else _joined(subject[1], verb[1], thing[1])
        rows.append(Row(f"{english} =>", german))
    return rows


def arithmetic() -> list[Row]:
    """Sums and differences of three numbers of one digit."""
    draw = random.Random("arithmetic")
    rows = []
    for _ in range(ROWS):
        text = f"{draw.randrange(10)}{draw.choice('+-')}{draw.randrange(10)}{draw.choice('+-')}{draw.randrange(10)}"
        rows.append(Row(f"{text}=", str(eval(text))))
    return rows


def python_values() -> list[Row]:
    """Python expressions over short lists of digits, and what they evaluate to, written without spaces."""
    draw = random.Random("python")
    rows = []
    for _ in range(ROWS):
        text = f"[{','.join(str(draw.randrange(10)) for _ in range(draw.randint(3, 4)))}]"
        for _ in range(draw.randrange(3)):
            text = draw.choice(_LISTS).format(text, draw.randrange(10))
        text = draw.choice(_NUMBERS).format(text) if draw.random() < 0.5 or not text.strip("[0123456789,]") else text
        rows.append(Row(f"{text}==", str(eval(text)).replace(" ", "")))
    return rows


def make_tokenizer(rows: Sequence[Row]) -> PreTrainedTokenizerFast:
    """Byte-level BPE made from the rows; every digit is a token of its own, and any text can be written."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for row in rows for text in (row.text, row.label)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, model_max_length=PACK, clean_up_tokenization_spaces=False
    )


def packed(tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row]) -> tuple[Tensor, ...]:
    """Rows behind each other in lines of `PACK` tokens, each `(lines, PACK)`: token ids, positions, targets.

    Positions begin again with every row, from which Llama knows that they must not see each other. The target of a token is
    the next one if that belongs to an answer (or ends it), else -100.
    """
    prompts = tokenizer([row.text for row in rows])["input_ids"]
    answers = tokenizer([row.label for row in rows])["input_ids"]
    lines: list[tuple[list[int], list[int], list[int]]] = []  # ids, positions, targets
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = [*prompt, *answer, end]
        if not lines or len(lines[-1][0]) + len(tokens) > PACK:
            lines.append(([], [], []))
        ids, positions, targets = lines[-1]
        ids += tokens
        positions += range(len(tokens))
        targets += [*[IGNORED] * (len(prompt) - 1), *answer, end, IGNORED]
    for ids, positions, targets in lines:
        rest = PACK - len(ids)
        ids += [pad] * rest
        positions += range(rest)
        targets += [IGNORED] * rest
    return tuple(torch.tensor([line[part] for line in lines]) for part in range(3))


def _pairs(words: str) -> list[tuple[str, str]]:
    return [(english, german) for english, german in (pair.split() for pair in words.split(", "))]


def _joined(*words: str) -> str:
    return " ".join(word for word in words if word)
