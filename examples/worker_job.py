# /// script
# requires-python = ">=3.11"
# dependencies = ["hf_merge[postgres]"]
# ///
"""One worker of a search, as a job on Hugging Face's hardware: start as many as you like, and stop any of them at any time.

Put study.yaml into a folder `studies`, and start a PostgreSQL server that the jobs reach (any hosted one will do); then

    export STORAGE=postgresql://user:password@host/name
    for i in 1 2 3 4; do
        hf jobs uv run --detach --flavor l4x1 --timeout 6h --secrets HF_TOKEN --secrets STORAGE -v ./studies:/studies \
            examples/worker_job.py /studies/study.yaml --study my-merge
    done

A job that ends early hands its recipe back, and a machine that dies loses one evaluation. To watch the search, re-score its
front on held-out data and publish a point of it, run the same study on your own machine:

    hf-merge auto studies/study.yaml --storage "$STORAGE" --study my-merge --push-to me/merged
"""

import os
import sys

from hf_merge.cli import main

if __name__ == "__main__":
    sys.exit(main(["worker", *sys.argv[1:], "--storage", os.environ["STORAGE"]]))
