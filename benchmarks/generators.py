"""What the generative specialists, their base and their averages know: scores on held-out rows.

python benchmarks/generators.py          # the demo's family, about a million parameters each; minutes on a CPU
python benchmarks/generators.py --large  # 26 million parameters each; wants a GPU
"""

import argparse
import time

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from hf_merge.demo.generator_objectives import objectives
from hf_merge.demo.generators import GENERATORS, generators
from hf_merge.demo.specialists import build_family
from hf_merge.evaluation.measure import Evaluator

SCALINGS = (1 / 3, 0.5, 0.7, 1.0)
"""Of the sum of the specialists' deltas; the first is the average of the specialists."""
REPLICATES = 200


def main() -> None:
    """Builds the family, unless it is cached, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true", help="the larger family")
    parser.add_argument("--execute", action="store_true", help="let Python judge the answers to Python expressions")
    options = parser.parse_args()
    start, cpu = time.perf_counter(), time.process_time()
    built = build_family(generators("generators-large", "small") if options.large else GENERATORS)
    print(f"built or found in {time.perf_counter() - start:.0f} s ({time.process_time() - cpu:.0f} s of CPU): {built.path}")
    torch.set_num_threads(1)
    model = LlamaForCausalLM.from_pretrained(built.base)
    print(f"{model.num_parameters():,} parameters, {model.config.num_hidden_layers} layers\n")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(built.base)
    tasks = objectives(built, execute=options.execute)
    evaluator = Evaluator(tasks, tokenizer=tokenizer, config=model.config, progress=False)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    states = {task: LlamaForCausalLM.from_pretrained(folder).state_dict() for task, folder in built.models.items()}
    deltas = {name: sum(state[name] - tensor for state in states.values()) for name, tensor in base.items()}
    rows = {"base": base, **states}
    rows |= {f"scaling {s:.2f}": {name: base[name] + s * deltas[name] for name in base} for s in SCALINGS}
    print(
        "held out, ± standard error (bootstrap)\n| model | "
        + " | ".join(f"{task.name}, {task.metric_name}" for task in tasks)
        + " | seconds |"
    )
    print("|---" * (len(tasks) + 2) + "|")
    for name, state in rows.items():
        model.load_state_dict(state)
        start = time.perf_counter()
        scores = evaluator.measure(model, "held_out", replicates=REPLICATES).values()
        cells = [f"{score.value:.3f} ± {torch.tensor(score.replicates).std():.3f}" for score in scores]
        print(f"| {name} | {' | '.join(cells)} | {time.perf_counter() - start:.1f} |", flush=True)


if __name__ == "__main__":
    main()
