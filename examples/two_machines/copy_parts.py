"""Give each machine of a hostfile the files that its layers need, and no more.

    python examples/two_machines/copy_parts.py MODEL hostfile.json FOLDER [--split 40,21]

Copies with rsync over ssh, into the same FOLDER everywhere ("{rank}" in it is the rank's number);
run it again to resume. Every machine has to load with the same --split as given here.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
from pathlib import Path

from mlx_streamexperts import StreamConfig, plan_ranks
from mlx_streamexperts._analysis.machines import other_files


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="the whole checkpoint, on this machine")
    parser.add_argument("hostfile", type=Path)
    parser.add_argument("folder", help="where the parts go, on each machine")
    parser.add_argument("--split", help="layers of each rank, the last layers first")
    args = parser.parse_args()
    hosts = json.loads(args.hostfile.read_text())
    hosts = hosts["hosts"] if isinstance(hosts, dict) else hosts
    # Which layers a rank has does not depend on budgets: any that fits will do here.
    config = StreamConfig(split=args.split, cache="1TB")
    for rank in plan_ranks(str(args.model), len(hosts), config):
        host = hosts[rank.stage.rank]["ssh"]
        to = args.folder.replace("{rank}", str(rank.stage.rank))
        files = [*other_files(args.model), *rank.files]
        print(f"{rank.stage}: {len(files)} files to {host}:{to}", flush=True)
        local = host == "127.0.0.1"
        make = ["mkdir", "-p", to]
        subprocess.run(make if local else ["ssh", host, shlex.join(make)], check=True)
        # The Hub's cache is made of links: -L copies what they point to.
        paths = [str(args.model / f) for f in files]
        where = f"{to}/" if local else f"{host}:{to}/"
        subprocess.run(["rsync", "-tL", "--partial", *paths, where], check=True)


if __name__ == "__main__":
    main()
