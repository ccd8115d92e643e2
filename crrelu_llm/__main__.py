"""`python -m crrelu_llm` is `crrelu`; `accelerate launch -m crrelu_llm ...` uses it."""

import sys

from crrelu_llm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
