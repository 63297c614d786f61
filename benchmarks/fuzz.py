"""Thousands of commands with mistakes in rows, files and settings: which end in a traceback, or in "unexpected"?

    python benchmarks/fuzz.py --examples 5000 --seed 1

The strategies are those of ``tests/test_fuzz.py``. Prints every distinct fault with a command that shows it; exit
status 1 where there is any.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import fuzzing
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from alignkit.testing import SMALL, tiny_model, tokenizer_folder


class Folders:
    """Enough of pytest's ``tmp_path_factory`` for the fixtures that make a tiny model."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def mktemp(self, name: str) -> Path:
        return Path(tempfile.mkdtemp(dir=self.root, prefix=name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=2000, help="of each kind; of runs a twentieth")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--kinds", nargs="+", choices=("files", "settings", "runs"), default=("files", "settings", "runs")
    )
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="alignkit-fuzz-"))
    os.chdir(root)
    folders = Folders(root)
    model = tiny_model.__wrapped__(tokenizer_folder.__wrapped__(folders), folders)()
    common = ["--model", str(model), "--output", str(root / "runs")]
    keys = fuzzing.known_keys()
    faults = set[str]()
    tried: collections.Counter[str] = collections.Counter()
    thorough = settings(
        max_examples=options.examples,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )

    def run(kind: str, arguments: list[str]) -> None:
        tried[kind] += 1
        wrong = fuzzing.fault(arguments)
        if wrong and (kind_of_fault := re.sub(r"'[^']*'|\d+", "_", wrong)) not in faults:
            faults.add(kind_of_fault)
            print(f"\n{wrong.strip()[:500]}\n    {str(arguments)[:1000]}", flush=True)

    @seed(options.seed)
    @thorough
    @given(st.sampled_from(fuzzing.STAGES), st.lists(fuzzing.files(), min_size=1, max_size=3), st.booleans())
    def of_files(stage: str, made: list[fuzzing.File], whole: bool) -> None:
        folder = fuzzing.write(root / "data", made)
        data = str(folder if whole else folder / made[0].name)
        run("files", ["check", "--plugin", stage, "--data", data, *common])

    @seed(options.seed)
    @thorough
    @given(st.sampled_from(fuzzing.STAGES), fuzzing.settings(keys), fuzzing.config_files(keys))
    def of_settings(stage: str, overrides: list[str], text: str) -> None:
        (root / "run.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
        run("settings", ["check", "--config", "run.yaml", "--plugin", stage, *common, *overrides])

    numeric = {stage: fuzzing.numeric_keys(stage) for stage in ("sft", "rm", "dpo")}

    @seed(options.seed)
    @settings(thorough, max_examples=max(options.examples // 20, 1))
    @given(st.sampled_from(sorted(numeric)), st.data())
    def of_runs(stage: str, drawn: st.DataObject) -> None:
        made = drawn.draw(fuzzing.rows_of_stage(stage))
        (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
        base = [] if stage == "sft" else [f"{stage}.policy=base"]
        data = ["--data", "rows.jsonl", f"{stage}.data.on_bad_row=skip", *drawn.draw(fuzzing.numbers(numeric[stage]))]
        run("runs", ["train", "--overwrite", "--plugin", stage, *common, *SMALL, *data, *base])

    started = time.perf_counter()
    for kind, commands in (("files", of_files), ("settings", of_settings), ("runs", of_runs)):
        if kind in options.kinds:
            commands()
    seconds = time.perf_counter() - started
    print(f"\n{dict(tried)} commands in {seconds:.0f} s, seed {options.seed}: {len(faults)} distinct faults")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
