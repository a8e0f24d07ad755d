"""Run under torchrun by `test_broadcast.py`: every rank gets the reader's packs, states and errors."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megabagel.data.broadcast import ReplicaReader
from megabagel.data.faults import DataError
from tests.unit.data_fixtures import edit_group, make_reader, same_pack, t2i_group, vlm_group, vlm_line

SOURCE = 1


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
    for owners in (None, [0, SOURCE]):
        replica = ReplicaReader(lambda: make_reader(mixed), dist.group.WORLD, SOURCE, owners)
        with make_reader(mixed) as alone:
            assert replica.state_dict() == alone.state_dict()
            for _ in range(3):
                ours, expected = replica.next(), next(alone)
                assert replica.state_dict() == alone.state_dict()
                assert expected.vae_images and expected.vit_images
                if owners is not None and rank not in owners:
                    assert not ours.vae_images and not ours.vit_images
                    expected.vae_images = expected.vit_images = []
                assert same_pack(ours, expected)
                ours.plan.position_ids += torch.zeros_like(ours.plan.position_ids)  # writable
            state, expected = replica.state_dict(), next(alone)
        replica.next()
        replica.load_state_dict(state)
        again = replica.next()
        assert torch.equal(again.plan.text_ids, expected.plan.text_ids) and again.keys == expected.keys
        replica.close()


def check_packs_without_pictures(folder: Path) -> None:
    replica = ReplicaReader(lambda: make_reader(groups(folder, "text")), dist.group.WORLD, SOURCE)
    pack = replica.next()
    assert not pack.vae_images and not pack.vit_images and pack.plan.text_ids.numel()
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
        message(replica.next),
        message(lambda: ReplicaReader(lambda: make_reader({"vlm_sft": None}), world, SOURCE)),
        message(lambda: replica.load_state_dict({**replica.state_dict(), "data_parallel": [0, 7]})),
    ]
    replica.close()
    assert "group vlm_sft: not one of 1 rows" in said[0], said
    assert "the data reader failed: AttributeError" in said[1], said
    assert "data_parallel [0, 7]" in said[2], said
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, said)
    assert everyone.count(said) == dist.get_world_size()


def main() -> None:
    dist.init_process_group("gloo")
    folder = Path(sys.argv[1]) / str(dist.get_rank())  # each rank its own files, the same in content
    check_packs_without_pictures(folder)
    check_errors(folder)
    check_packs_and_states(folder)
    dist.barrier()
    dist.destroy_process_group()
    print("broadcast is fine", flush=True)


if __name__ == "__main__":
    main()
