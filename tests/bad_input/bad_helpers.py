"""Table rows of bad input, and the check of a row."""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

from jaxtrain.cli import main

CODE = "import os, sys; from pathlib import Path; Path(sys.argv[0]).exists(); Path('pwned').touch()"


class Bomb:
    """Unpickling it would make a file."""

    def __reduce__(self):
        return (exec, (CODE,))


class World(NamedTuple):
    """Paths that the arguments of a case may name, as `{config}`."""

    tmp: Path  # the working directory, empty but for what the case makes
    config: Path  # a good config, JSON
    store: Path  # a copy of a good store, that a case may damage
    run: Path  # the same of a finished run
    corpus: Path
    out: Path  # does not exist

    def write(self, name, content):
        path = self.tmp / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content)

    def json(self, name, **changes):
        """A good config with sections changed; `None` leaves a section out."""
        values = json.loads(self.config.read_text())
        for key, value in changes.items():
            values[key] = values[key] | value if isinstance(value, dict) and key in values else value
        self.write(name, json.dumps({key: value for key, value in values.items() if value is not None}))

    def manifest(self, **changes):
        values = json.loads((self.store / "manifest.json").read_text()) | changes
        values.pop("checksum", None)
        (self.store / "manifest.json").write_text(json.dumps(values))

    def damage(self, name, change):
        path = self.store / name
        path.write_bytes(change(path.read_bytes()))


def snapshot(world):
    paths = [path for path in world.tmp.parent.rglob("*")]
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else path.is_symlink()
        for path in paths
    }


class Bad(NamedTuple):
    arguments: str  # split at blanks; `''` is an empty argument
    message: tuple[str, ...]  # the value and the remedy
    make: object = None  # prepares the world
    code: int = 2
    starts: bool = False  # seen at the first step only: there is a run directory, which may be used again


def bad(arguments, *message, **fields):
    return Bad(arguments, message, **fields)


TRAIN = "train {config} --run-dir {out}"


def values(**changes):
    return lambda world: world.json("c.json", **changes)


def text(name, content):
    return lambda world: world.write(name, content)


def arguments_of(row, world):
    return [word.format(**world._asdict()).replace("''", "") for word in row.arguments.split()]


def check(row, world, capsys):
    """One or two clear lines, the right exit code, and nothing written, changed or lost."""
    if row.make:
        row.make(world)
    before = snapshot(world)
    code = main(arguments_of(row, world))
    captured = capsys.readouterr()
    assert "Traceback" not in captured.out + captured.err
    assert code == row.code, captured.err
    lines = captured.err.splitlines()
    missing = [part for part in row.message if part not in captured.err]
    assert not missing, captured.err
    assert lines[0].startswith("error: ")
    after = snapshot(world)
    if row.starts:
        after = {path: value for path, value in after.items() if not path.startswith(str(world.out))}
    assert after == before, sorted(dict(after.items() ^ before.items()))
    assert len(lines) <= 2 or lines[1].startswith("  "), captured.err  # or a list of what differs
