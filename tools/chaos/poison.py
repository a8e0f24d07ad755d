"""Trains like `python -m megabagel.train`, but the data of one step hold a picture that is no numbers.

For tests of what a run does about it: the same step is poisoned in every attempt. Under torchrun every rank runs it.

    torchrun --nproc-per-node 4 tools/chaos/poison.py --step 7 -- --config demo --checkpoint.run_dir runs/chaos
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, when it is not installed

from megabagel import train
from megabagel.data.faults import DataError
from megabagel.data.handout import is_stored
from megabagel.data.pack import Pack
from megabagel.data.reader import Reader
from megabagel.training.loop import Trainer


def poison(packs: list[Pack], channels: int, downsample: int) -> list[Pack]:
    """The packs, the latents of the first picture that the autoencoder would see replaced by NaN, as if stored so.

    Raises DataError when no pack has one.
    """
    for number, pack in enumerate(packs):
        if pack.vae_images:
            picture = pack.vae_images[0]
            if is_stored(picture.shape):
                bad = torch.full_like(picture, torch.nan)
            else:
                bad = torch.full((2 * channels, *(side // downsample for side in picture.shape[1:])), torch.nan)
            poisoned = dataclasses.replace(pack, vae_images=[bad, *pack.vae_images[1:]])
            return [*packs[:number], poisoned, *packs[number + 1 :]]
    raise DataError("no pack of this step has a picture to poison; choose another step with --step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", type=int, required=True, help="which step; the first one is 1")
    parser.add_argument("--replica", type=int, default=0, help="whose data")
    parser.add_argument("options", nargs="*", help="of megabagel.train, behind --")
    wanted = parser.parse_args()
    trainers: list[Trainer] = []
    step_of, read = Trainer.train_step, Reader.next_step

    def train_step(trainer: Trainer) -> dict:
        trainers[:] = [trainer]
        return step_of(trainer)

    def next_step(reader: Reader) -> list[Pack]:
        packs = read(reader)
        if not trainers or trainers[0].step + 1 != wanted.step or trainers[0].layout.dp_rank != wanted.replica:
            return packs
        vae = trainers[0].config.model.vae
        return poison(packs, vae.z_channels, vae.downsample)

    with mock.patch.object(Trainer, "train_step", train_step), mock.patch.object(Reader, "next_step", next_step):
        train.main(wanted.options)


if __name__ == "__main__":
    main()
