"""``python -m ietagc_diffusers COMMAND`` is ``ietagc COMMAND``."""

import sys

from ietagc_diffusers.cli import main

if __name__ == "__main__":
    sys.exit(main(prog="python -m ietagc_diffusers"))
