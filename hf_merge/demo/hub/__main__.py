"""`python -m hf_merge.demo.hub --root DIR [--port N]`: run a local Hub until interrupted."""

import argparse
from pathlib import Path

from hf_merge.demo.hub.server import ACCOUNTS_VARIABLE, serve


def main() -> None:
    """Parse the command line and serve."""
    parser = argparse.ArgumentParser(
        prog="python -m hf_merge.demo.hub",
        description="A local Hub on 127.0.0.1. Point clients at the printed address with HF_ENDPOINT, and set "
        "HF_HUB_DISABLE_XET=1 and HF_TOKEN=hf_local (user demo).",
        epilog=f'Other accounts: {ACCOUNTS_VARIABLE}=\'{{"users": {{token: name}}, "organizations": {{...}}}}\'.',
    )
    parser.add_argument("--root", type=Path, required=True, help="folder of the repositories")
    parser.add_argument("--port", type=int, default=0, help="0 picks a free port")
    parser.add_argument("--until-stdin-closes", action="store_true", help="stop when the parent process ends")
    arguments = parser.parse_args()
    serve(arguments.root, arguments.port, until_stdin_closes=arguments.until_stdin_closes)


if __name__ == "__main__":
    main()
