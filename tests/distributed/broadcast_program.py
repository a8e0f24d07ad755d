"""Run under torchrun by `test_broadcast.py`: every rank gets the reader's packs, states and errors, and of the pixels
those of its own pictures only."""

import dataclasses
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from megabagel.data.broadcast import ReplicaReader, broadcast_pack
from megabagel.data.faults import DataError
from megabagel.data.handout import hand_out
from megabagel.data.pack import Pack
from megabagel.data.steps import EndOfData
from tests.unit.data_fixtures import edit_group, make_reader, same_pack, t2i_group, vlm_group, vlm_line

SOURCE = 1


def pictures(packs: list[Pack]) -> list[torch.Tensor]:
    """In the order of owners."""
    return [i for pack in packs for i in pack.vae_images] + [i for pack in packs for i in pack.vit_images]


def without_pixels(pack: Pack) -> Pack:
    return dataclasses.replace(pack, vae_images=[], vit_images=[])


def groups(folder: Path, name: str) -> dict:
    """Writes the files, too."""
    if name == "mixed":
        return {"unified_edit": edit_group(folder), "vlm_sft": vlm_group(folder), "t2i_pretrain": t2i_group(folder)}
    lines = [vlm_line(0)] if name == "text" else ["{broken"]
    return {"vlm_sft": vlm_group(folder / name, lines)}


def check_packs_and_states(folder: Path) -> None:
    rank = dist.get_rank()
    shared = [groups(folder, "mixed") if rank == SOURCE else None]
    dist.broadcast_object_list(shared, SOURCE)
    mixed = shared[0]
    replica = ReplicaReader(lambda: make_reader(mixed, global_batch_size=2), dist.group.WORLD, SOURCE)
    with make_reader(mixed, global_batch_size=2) as alone:
        assert replica.state_dict() == alone.state_dict()
        for _ in range(2):
            step, expected_step = replica.next_step(), alone.next_step()
            assert replica.state_dict() == alone.state_dict()
            for ours, expected in zip(step, expected_step, strict=True):
                assert expected.vae_images and expected.vit_images
                assert all(image.is_meta == (rank != SOURCE) for image in pictures([ours]))
                shapes = [image.shape for image in pictures([expected])]
                assert [image.shape for image in pictures([ours])] == shapes
                assert same_pack(without_pixels(ours), without_pixels(expected))
                ours.plan.position_ids += torch.zeros_like(ours.plan.position_ids)  # writable
        state, (expected, _) = replica.state_dict(), alone.next_step()
    replica.next_step()
    replica.load_state_dict(state)
    again, _ = replica.next_step()
    assert torch.equal(again.plan.text_ids, expected.plan.text_ids) and again.keys == expected.keys
    replica.close()


# who encodes the n-th of the pictures
SHARES = {
    "everyone": lambda n: n % 3,
    "nobody but rank 0": lambda n: 0,
    "nobody but the source": lambda n: SOURCE,
    "the others": lambda n: n % 2 * 2,
    "a rank after the source, but for one picture": lambda n: 2 if n else 0,
}


def check_pixels(folder: Path) -> None:
    """Pixels reach the owner of a picture and nobody else."""
    rank, world = dist.get_rank(), dist.group.WORLD
    with make_reader(groups(folder, "mixed"), global_batch_size=2) as reader:
        whole = reader.next_step()
    mine = [broadcast_pack(pack if rank == SOURCE else None, world, SOURCE) for pack in whole]
    assert pictures(whole[:1]) and pictures(whole[1:])
    for name, owner_of in SHARES.items():
        owners = [owner_of(n) for n in range(len(pictures(whole)))]
        with mock.patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as travel:
            held = hand_out(mine, owners, world, SOURCE)
        own = 0
        for image, owner, expected in zip(pictures(held), owners, pictures(whole), strict=True):
            assert image.shape == expected.shape and image.dtype == torch.uint8
            assert image.is_meta == (owner != rank), name
            if owner == rank:
                assert torch.equal(image, expected), name
                own += image.numel()
        assert all(same_pack(without_pixels(a), without_pixels(b)) for a, b in zip(held, mine, strict=True))
        assert all(image.is_meta == (rank != SOURCE) for image in pictures(mine)), "the packs are left as they are"
        received = sum(call.args[0].numel() for call in travel.call_args_list)
        assert received == (0 if rank == SOURCE else own), name
        total = torch.tensor(own)
        dist.all_reduce(total)
        assert total == sum(image.numel() for image in pictures(whole))
    assert hand_out([], [], world, SOURCE) == []


def check_packs_without_pictures(folder: Path) -> None:
    replica = ReplicaReader(lambda: make_reader(groups(folder, "text")), dist.group.WORLD, SOURCE)
    (pack,) = replica.next_step()
    assert not pack.vae_images and not pack.vit_images and pack.plan.text_ids.numel()
    assert same_pack(hand_out([pack], [], dist.group.WORLD, SOURCE)[0], pack)
    replica.close()


def check_end(folder: Path) -> None:
    chosen = groups(folder, "text")
    chosen["vlm_sft"].repeats = 1
    replica = ReplicaReader(lambda: make_reader(chosen), dist.group.WORLD, SOURCE)
    replica.next_step()
    try:
        replica.next_step()
    except EndOfData as end:
        assert "as often as it may be" in str(end)
    else:
        raise AssertionError("no end")
    replica.close()


def check_errors(folder: Path) -> None:
    def message(action) -> str:
        try:
            action()
        except DataError as error:
            return str(error)
        raise AssertionError("no error")

    world = dist.group.WORLD
    replica = ReplicaReader(lambda: make_reader(groups(folder, "broken")), world, SOURCE)
    said = [
        message(replica.next_step),
        message(lambda: ReplicaReader(lambda: make_reader({"vlm_sft": None}), world, SOURCE)),
        message(lambda: replica.load_state_dict({**replica.state_dict(), "num_rows": [7]})),
    ]
    replica.close()
    assert "group vlm_sft: not one of 1 rows" in said[0], said
    assert "the data reader failed: AttributeError" in said[1], said
    assert "num_rows [7]" in said[2], said
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, said)
    assert everyone.count(said) == dist.get_world_size()


def main() -> None:
    dist.init_process_group("gloo")
    folder = Path(sys.argv[1]) / str(dist.get_rank())  # each rank its own files, the same in content
    check_packs_without_pictures(folder)
    check_errors(folder)
    check_end(folder)
    check_packs_and_states(folder)
    check_pixels(folder)
    dist.barrier()
    dist.destroy_process_group()
    print("broadcast is fine", flush=True)


if __name__ == "__main__":
    main()
