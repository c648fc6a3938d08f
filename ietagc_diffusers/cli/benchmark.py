"""``ietagc benchmark``."""

import json
from argparse import SUPPRESS, ArgumentParser, Namespace

from ..console import say
from . import common


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="YAML file of the matrix, such as benchmark_laion10k"
    )
    parser.add_argument("--jobs", type=int, default=1, help="models that are trained at once; default: 1")
    parser.add_argument("--tables", action="store_true", help="only write the tables of the cells that are finished")
    parser.add_argument("--feature_cache", metavar="DIR|none", help=common.CACHE_HELP)
    parser.add_argument("--cell", help=SUPPRESS)  # a process of the benchmark's own: draw and score one cell
    common.add_device(parser)


def run(args: Namespace) -> int:
    common.check_positive(args, "jobs")
    from ietagc_diffusers.eval.benchmark import Benchmark, Cell
    from ietagc_diffusers.eval.benchmark import run as run_benchmark

    device, cache = common.device_of(args), common.cache_of(args)
    if args.cell:
        Benchmark(args.config).run_cell(Cell(*json.loads(args.cell)), device, cache)
        return 0
    failed = run_benchmark(args.config, args.jobs, device, cache, args.tables)
    output = Benchmark(args.config).output
    say((output / "tables.md").read_text(encoding="utf-8"))
    say(f"{output}/tables.md, tables.csv, tables.tex, results.json")
    return int(failed > 0)
