"""The table of runners: how each task's rows become something to run."""

from collections.abc import Callable, Mapping

from hf_merge.evaluation import tasks
from hf_merge.evaluation.objective import Objective
from hf_merge.evaluation.reader import Part, Reader
from hf_merge.evaluation.rows import Rows
from hf_merge.evaluation.runners.choices import multiple_choice
from hf_merge.evaluation.runners.classification import text_classification, token_classification
from hf_merge.evaluation.runners.code import code_generation
from hf_merge.evaluation.runners.embeddings import sentence_similarity, text_retrieval
from hf_merge.evaluation.runners.generation import text_generation
from hf_merge.evaluation.runners.images import image_classification
from hf_merge.evaluation.runners.likelihood import fill_mask, language_modeling

Prepare = Callable[[Objective, Rows, Reader], Part]

RUNNERS: Mapping[str, Prepare] = {
    tasks.TEXT_CLASSIFICATION: text_classification,
    tasks.TOKEN_CLASSIFICATION: token_classification,
    tasks.IMAGE_CLASSIFICATION: image_classification,
    tasks.LANGUAGE_MODELING: language_modeling,
    tasks.FILL_MASK: fill_mask,
    tasks.TEXT_GENERATION: text_generation,
    tasks.CODE_GENERATION: code_generation,
    tasks.MULTIPLE_CHOICE: multiple_choice,
    tasks.SENTENCE_SIMILARITY: sentence_similarity,
    tasks.TEXT_RETRIEVAL: text_retrieval,
}
