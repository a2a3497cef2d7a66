# ruff: noqa: INP001 - a program, no package
"""Checks files as such: trailing white space, the last newline, the syntax of TOML, YAML and JSON, and no secrets.

With file names, as pre-commit calls it, those files; without, every file that git knows or would add. White space is
mended (the run still fails, so that nothing is committed unseen); the rest is only named.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml  # type: ignore[import-untyped]

ROOT = Path(__file__).parents[1]
IGNORED = {".git", ".venv", ".cache", "data", "build", "dist", "__pycache__", ".hypothesis"}
BINARY = {".png", ".jpg", ".ico", ".gz", ".avro", ".bin", ".woff2"}
UNSPELLED = {"requirements.txt", "artifacts.sha256"}  # hashes
SECRETS = {
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----\s+\S{30}"),
    "an AWS access key": re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    "a GitHub token": re.compile(r"\bgh[pousr]_[A-Za-z0-9]{36}\b"),
    "a Slack token": re.compile(r"\bxox[abprs]-[A-Za-z0-9-]{20,}"),
    "a signed token": re.compile(r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{20,}"),
    "a key of this system": re.compile(r"NOTIFY_(?:SEAL|TOKEN)_KEY[\"']?\s*[=:]\s*[\"']?[A-Za-z0-9+/]{42,}={0,2}"),
}


def all_files() -> list[Path]:
    """Return the files to check when none is named."""
    git = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(git, capture_output=True, check=True, text=True).stdout.split("\0")  # noqa: S603
        found = {ROOT / name for name in listed if name}
    except (OSError, subprocess.CalledProcessError):  # an unpacked archive
        found = {path for path in ROOT.rglob("*") if not IGNORED & set(path.relative_to(ROOT).parts[:-1])}
    return sorted(path for path in found if path.is_file() and not path.is_symlink() and path.suffix not in BINARY)


def problems(path: Path) -> Iterator[str]:
    """Yield what is wrong with a file; mends its white space."""
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        yield "is not UTF-8"
        return
    mended = "\n".join(line.rstrip() for line in text.split("\n")).rstrip("\n") + "\n" if text.strip() else ""
    if mended != text:
        path.write_text(mended, "utf-8", newline="")
        yield "had white space at the end of a line or of the file: mended"
    try:
        parse(path.suffix, mended)
    except (ValueError, yaml.YAMLError) as error:
        yield f"cannot be parsed: {' '.join(str(error).split())}"
    for what, pattern in SECRETS.items():
        if pattern.search(mended):
            yield f"holds {what}"


def parse(suffix: str, text: str) -> None:
    """Parse the text of a file that is called so. Raises ValueError or YAMLError; does nothing for other kinds of files."""
    match suffix:
        case ".toml":
            tomllib.loads(text)
        case ".yaml" | ".yml":
            list(yaml.safe_load_all(text))
        case ".json" | ".avsc":
            json.loads(text)
        case ".ndjson":
            for line in text.splitlines():
                json.loads(line)


def main(arguments: Sequence[str]) -> int:
    """Check, or with --list name the files whose spelling is checked; return the exit code."""
    if list(arguments) == ["--list"]:
        names = [str(path.relative_to(ROOT)) for path in all_files() if path.name not in UNSPELLED]
        sys.stdout.write("\n".join(names) + "\n")
        return 0
    files = [Path(name) for name in arguments] or all_files()
    found = [f"{path}: {problem}" for path in files for problem in problems(path)]
    sys.stdout.writelines(f"{line}\n" for line in found)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
