"""The order of samples and their random numbers do not depend on how a run is divided."""

import itertools

import torch
from torch.utils.data import DataLoader, Dataset

from sgm.data.loader import SeededDataset, sample_order
from sgm.seeds import derived_seed


def first(order, count):
    return list(itertools.islice(iter(order), count))


def test_an_epoch_holds_every_item_once_and_the_next_one_in_another_order():
    stream = [key[0][0] for key in first(sample_order(10, 1, seed=3), 20)]
    assert sorted(stream[:10]) == sorted(stream[10:]) == list(range(10))
    assert stream[:10] != stream[10:]


def test_a_resumed_stream_goes_on_where_it_was_in_the_middle_of_an_epoch():
    whole = first(sample_order(5, 2, seed=3), 6)
    assert first(sample_order(5, 2, seed=3, start=6), 3) == whole[3:]


def test_processes_share_the_stream_out_and_may_change_in_number():
    alone = [key for batch in first(sample_order(7, 1, seed=1), 12) for key in batch]
    pairs = [sample_order(7, 2, seed=1, rank=rank, world_size=3) for rank in range(3)]
    batches = [first(order, 2) for order in pairs]
    together = [key for k in range(2) for rank in range(3) for key in batches[rank][k]]
    assert together == alone


def test_seeds_differ_by_place_and_by_run():
    seeds = {derived_seed(s, *place) for s in (0, 1) for place in [(0, 0), (0, 1), (1, 0), (1,)]}
    assert len(seeds) == 8
    assert derived_seed(-1, 0) == derived_seed(2**64 - 1, 0)  # a seed may be negative


class Drawing(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {"index": index, "drawn": torch.rand(2)}


def test_items_draw_the_same_in_workers_and_without_and_leave_the_generator_alone():
    drawn = []
    for workers in (0, 2):
        order = sample_order(4, 2, seed=5)
        loader = DataLoader(SeededDataset(Drawing()), batch_sampler=order, num_workers=workers)
        torch.manual_seed(workers)
        iterator = iter(loader)
        state = torch.get_rng_state()
        batches = [next(iterator) for _ in range(3)]
        assert torch.equal(torch.get_rng_state(), state)
        drawn.append(torch.stack([batch["drawn"] for batch in batches]))
    assert torch.equal(*drawn)
    assert len(drawn[0].unique()) == drawn[0].numel()
