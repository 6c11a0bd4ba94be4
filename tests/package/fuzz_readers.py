"""Search for bytes that a reader neither takes nor refuses by name, guided by the coverage of the package's code.

python fuzz_readers.py CASE -max_total_time=SECONDS [more of libFuzzer's options]
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["tikmix_fast"]):
    import test_fuzzed_files as readers


def main(case: str, options: list[str]) -> None:
    warnings.simplefilter("ignore")
    logging.disable()
    name, write, _ = readers.CASES[case]
    with tempfile.TemporaryDirectory() as folder:
        seeds = Path(folder) / "seeds"
        seeds.mkdir()
        write(Path(folder) / name)
        (Path(folder) / name).rename(seeds / "written")
        # In a damaged file only the checksum would be tried; without it the content is.
        if name.endswith(".json"):
            content = readers.json.loads((seeds / "written").read_text())
            content.pop("sha256", None)
            (seeds / "unsealed").write_text(readers.json.dumps(content))
        atheris.Setup(
            [sys.argv[0], *options, "-max_len=4096", str(seeds)],
            lambda content: readers.read_damaged(case, lambda _: content),
        )
        atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
