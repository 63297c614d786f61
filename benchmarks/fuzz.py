"""Thousands of inputs with mistakes: which end a command in a traceback, in "unexpected", a hang or half a run?

    python benchmarks/fuzz.py --examples 5000 --seed 1

=============  ========================================================================================================
``files``      ``check`` on files of rows
``settings``   ``check`` on overrides and config files
``runs``       ``train`` on odd rows and numbers
``folders``    commands that read run folders, after one or two changes of a run
``models``     ``chat`` and ``compare`` after such changes
``resumes``    ``train --resume`` after such changes
``requests``   requests to the page of ``label``
=============  ========================================================================================================

The strategies are those of the tests. Prints every distinct fault with a command that shows it; exit status 1 if there
is any.
"""

from __future__ import annotations

import argparse
import collections
import functools
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
import label_clients
import label_requests
import label_samples
import tampering
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from alignkit.runs import curves
from alignkit.testing import SMALL, tiny_model, tokenizer_folder

KINDS = ("files", "settings", "runs", "folders", "models", "resumes", "requests")
SLOW = {"runs": 20, "models": 10, "resumes": 20}  # so many times fewer examples
FOLDERS = {"folders": tampering.READ, "models": tampering.LOAD, "resumes": tampering.TRAIN}


class Folders:
    """Enough of pytest's ``tmp_path_factory`` for the fixtures that make a tiny model."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def mktemp(self, name: str) -> Path:
        return Path(tempfile.mkdtemp(dir=self.root, prefix=name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=2000, help="of each kind; fewer of those that train or load")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    options = parser.parse_args()
    curves.can_draw = lambda: False  # a picture takes longer than such a run
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
        count(kind, fuzzing.fault(arguments), str(arguments))

    def count(kind: str, wrong: str | None, case: str) -> None:
        tried[kind] += 1
        if wrong and (kind_of_fault := re.sub(r"'[^']*'|\d+|/\S+", "_", wrong)) not in faults:
            faults.add(kind_of_fault)
            print(f"\n{wrong.strip()[:500]}\n    {case[:1000]}", flush=True)

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
    @settings(thorough, max_examples=max(options.examples // SLOW["runs"], 1))
    @given(st.sampled_from(sorted(numeric)), st.data())
    def of_runs(stage: str, drawn: st.DataObject) -> None:
        made = drawn.draw(fuzzing.rows_of_stage(stage))
        (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
        base = [] if stage == "sft" else [f"{stage}.policy=base"]
        data = ["--data", "rows.jsonl", f"{stage}.data.on_bad_row=skip", *drawn.draw(fuzzing.numbers(numeric[stage]))]
        run("runs", ["train", "--overwrite", "--plugin", stage, *common, *SMALL, *data, *base])

    def of_folders(kind: str) -> None:
        if not (root / "whole").exists():
            tampering.make_runs(model)

        @seed(options.seed)
        @settings(thorough, max_examples=max(options.examples // SLOW.get(kind, 1), 1))
        @given(tampering.tampered(root / "whole" / "runs", sorted(FOLDERS[kind])))
        def tried_on(case: tampering.Case) -> None:
            count(kind, case.fault(root / "whole" / "runs", FOLDERS[kind]), str(case))

        tried_on()

    def of_requests() -> None:
        rows = label_samples.numbered(options.examples + 1, k=2)
        site = label_clients.Site(label_clients.write_rows(root / "samples.jsonl", rows), scale=5, flags=["rude"])

        @seed(options.seed)
        @thorough
        @given(label_requests.requests())
        def tried_on(sent: label_requests.Sent) -> None:
            count("requests", label_requests.fault(site.labeler(), sent), str(sent))

        tried_on()
        site.store.close()

    started = time.perf_counter()
    by_kind = {"files": of_files, "settings": of_settings, "runs": of_runs, "requests": of_requests}
    by_kind |= {kind: functools.partial(of_folders, kind) for kind in FOLDERS}
    for kind in options.kinds:
        by_kind[kind]()
    seconds = time.perf_counter() - started
    print(f"\n{dict(tried)} inputs in {seconds:.0f} s, seed {options.seed}: {len(faults)} distinct faults")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
