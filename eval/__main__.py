"""``python -m eval COMMAND`` is ``ietagc COMMAND``, in a checkout."""

import sys

from ietagc_diffusers.cli import main

if __name__ == "__main__":
    sys.exit(main(prog="python -m eval"))
