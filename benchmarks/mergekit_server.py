"""mergekit as a peer's search runs it: one process, started once with the Python of mergekit's environment, merges on request.

Reads lines of JSON, [recipe file, folder], from its standard input; answers each with a line of JSON: null or what went wrong,
and the CPU seconds that the merge took.
"""

import json
import sys
import time

import torch
from mergekit.scripts.run_yaml import main as mergekit_yaml


def main() -> None:
    """Merges until the input ends."""
    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        recipe, folder = json.loads(line)
        error, start = None, time.process_time()
        try:
            mergekit_yaml.main([recipe, folder, "--quiet", "--no-write-model-card"], standalone_mode=False)
        except Exception as problem:
            error = f"{type(problem).__name__}: {problem}"
        print(json.dumps([error, time.process_time() - start]), file=answers, flush=True)


if __name__ == "__main__":
    main()
