"""The table of hf_merge's own metrics."""

from collections.abc import Mapping

from hf_merge.evaluation.code import PassAtK
from hf_merge.evaluation.metrics.classes import F1, Accuracy, Matthews, NormalizedAccuracy
from hf_merge.evaluation.metrics.ranking import NDCG, Pearson, Recall, Spearman
from hf_merge.evaluation.metrics.summed import SummedMetric
from hf_merge.evaluation.metrics.texts import ChrF, ExactMatch, NumberMatch, Rouge
from hf_merge.evaluation.metrics.tokens import EntityF1, Perplexity, TagAccuracy, TokenAccuracy

METRICS: Mapping[str, type[SummedMetric]] = {
    "accuracy": Accuracy,
    "normalized_accuracy": NormalizedAccuracy,
    "f1": F1,
    "matthews": Matthews,
    "exact_match": ExactMatch,
    "number_match": NumberMatch,
    "chrf": ChrF,
    "rouge": Rouge,
    "pass_at_k": PassAtK,
    "perplexity": Perplexity,
    "token_accuracy": TokenAccuracy,
    "tag_accuracy": TagAccuracy,
    "entity_f1": EntityF1,
    "spearman": Spearman,
    "pearson": Pearson,
    "ndcg": NDCG,
    "recall": Recall,
}
