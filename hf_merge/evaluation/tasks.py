"""The tasks: what each reads, how it is scored and which models can do it. Data alone: their code is in `runners`.

A new task is an entry here and a runner beside the others, named in `runners.table`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

TEXT_CLASSIFICATION, TOKEN_CLASSIFICATION, IMAGE_CLASSIFICATION = (
    "text-classification",
    "token-classification",
    "image-classification",
)
LANGUAGE_MODELING, FILL_MASK, TEXT_GENERATION = "language-modeling", "fill-mask", "text-generation"
MULTIPLE_CHOICE, SENTENCE_SIMILARITY, TEXT_RETRIEVAL = "multiple-choice", "sentence-similarity", "text-retrieval"
CODE_GENERATION, LM_EVAL = "code-generation", "lm-eval"
NONE = "none"

NEEDS_LEAVE = (
    "Scoring code runs programs that models write on this machine, shut in a sandbox: set allow_code_execution=True if that is "
    "what you want."
)
LOWER_IS_BETTER = frozenset(
    ("size", "delta_norm", "latency", "loss", "mse", "mae", "rmse", "mape", "smape", "mase")
) | frozenset(("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "wer", "cer", "ter", "brier_score"))
"""Names of metrics, ours and others', that are minimized."""

# Ends of the names of transformers' classes, longer ones first: they tell which head a model has.
HEADS = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForImageClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
    "ForMaskedLM",
    "ForCausalLM",
    "ForConditionalGeneration",
    "DoubleHeadsModel",
    "LMHeadModel",
    "EncoderModel",
    "Model",
)
_CAUSAL = ("ForCausalLM", "ForConditionalGeneration", "DoubleHeadsModel", "LMHeadModel")


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task.

    Args:
        metrics: hf_merge's own for it; the first is the default. None for tasks that bring their own.
        input: what an input column holds: "text", "words" (a list of them) or "image".
        columns: how many input columns there are at least and at most.
        target: what the target column holds: "class", "tags" (one for each word), "text", "choice" (which of the choices),
            "number", "documents" (the relevant ones) or "program" (tests of what was written); None where nothing is compared.
        options: fields of `Objective` that mean something to this task and not to every one.
        heads: ends of class names of the models that can do it (of `HEADS`); () for every model.
        own_metrics: whether only the metrics above understand what its runner gives.
        encoder_decoder: whether a model with an encoder and a decoder can do it.
    """

    metrics: tuple[str, ...]
    input: str = "text"
    columns: tuple[int, int] = (1, 1)
    target: str | None = None
    options: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    own_metrics: bool = False
    encoder_decoder: bool = True


_CLASSES = ("accuracy", "f1", "matthews")
_LIKELIHOOD = ("perplexity", "token_accuracy")

TASKS: Mapping[str, Task] = {
    TEXT_CLASSIFICATION: Task(
        metrics=_CLASSES,
        columns=(1, 2),
        target="class",
        options=("labels", "smoothed"),
        heads=("ForSequenceClassification",),
    ),
    TOKEN_CLASSIFICATION: Task(
        metrics=("entity_f1", "tag_accuracy"),
        input="words",
        target="tags",
        options=("labels",),
        heads=("ForTokenClassification",),
    ),
    IMAGE_CLASSIFICATION: Task(
        metrics=_CLASSES,
        input="image",
        target="class",
        options=("labels", "smoothed"),
        heads=("ForImageClassification",),
    ),
    LANGUAGE_MODELING: Task(metrics=_LIKELIHOOD, heads=_CAUSAL, own_metrics=True, encoder_decoder=False),
    FILL_MASK: Task(metrics=_LIKELIHOOD, heads=("ForMaskedLM",), own_metrics=True, encoder_decoder=False),
    TEXT_GENERATION: Task(
        metrics=("exact_match", "number_match", "chrf", "rouge"),
        target="text",
        options=("prompt", "max_new_tokens"),
        heads=_CAUSAL,
    ),
    CODE_GENERATION: Task(
        metrics=("pass_at_k",),
        target="program",
        options=("prompt", "max_new_tokens", "task_arguments", "allow_code_execution"),
        heads=_CAUSAL,
        own_metrics=True,
    ),
    LM_EVAL: Task(metrics=(), target="text", options=("task_arguments",), heads=_CAUSAL, own_metrics=True),
    MULTIPLE_CHOICE: Task(
        metrics=("accuracy", "normalized_accuracy"),
        target="choice",
        options=("prompt", "choices", "smoothed"),
        heads=_CAUSAL,
        encoder_decoder=False,
    ),
    SENTENCE_SIMILARITY: Task(metrics=("spearman", "pearson"), columns=(2, 2), target="number", options=("pooling",)),
    TEXT_RETRIEVAL: Task(metrics=("ndcg", "recall"), target="documents", options=("corpus", "pooling")),
    NONE: Task(metrics=("size", "delta_norm", "latency"), own_metrics=True),
}


def head_of(architecture: str) -> str | None:
    """The head that a transformers class has by its name; None for names that follow no known pattern."""
    return next((head for head in HEADS if architecture.endswith(head)), None)
