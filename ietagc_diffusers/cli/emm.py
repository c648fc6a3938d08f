"""``ietagc emm``."""

import json
from argparse import SUPPRESS, ArgumentParser, Namespace

from ..console import say
from . import common


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="YAML file of configurations and sizes, such as emm_cifar10"
    )
    parser.add_argument("--jobs", type=int, default=1, help="models that are trained at once; default: 1")
    parser.add_argument("--results", action="store_true", help="only write the results of the models that are finished")
    parser.add_argument("--cell", help=SUPPRESS)  # a process of the command's own: draw from the models of one run
    common.add_device(parser)


def run(args: Namespace) -> int:
    common.check_positive(args, "jobs")
    from ietagc_diffusers.eval.emm import Study
    from ietagc_diffusers.eval.emm import run as run_study

    device = common.device_of(args)
    if args.cell:
        name, size = json.loads(args.cell)
        Study(args.config).measure(name, size, device)
        return 0
    failed = run_study(args.config, args.jobs, device, args.results)
    output = Study(args.config).output
    say((output / "emm.md").read_text(encoding="utf-8"))
    say(f"{output}/emm.md, emm.json, emm.png")
    return int(failed > 0)
