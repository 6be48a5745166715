"""A sampler is a pure function of (seed, epoch, sample index)."""

import torch

from ravine.datamodules.samplers import EpochSampler, seeded_generator


def test_a_generator_depends_on_seed_and_key_alone() -> None:
    def draw(seed: int, *key: int | str) -> int:
        return int(torch.randint(10**6, (1,), generator=seeded_generator(seed, *key)))

    assert draw(1, "noise", 2) == 551_552  # in every process, on every machine
    torch.manual_seed(99)
    assert draw(1, "noise", 2) == 551_552
    different = {draw(s, w, i) for s in range(5) for w in ("a", "b") for i in range(5)}
    assert len(different) == 50


def test_an_epoch_without_replacement_holds_every_item_once() -> None:
    order = EpochSampler(0, 50)
    first, second = order(0, 0, 50), order(1, 0, 50)
    assert sorted(first.tolist()) == list(range(50)) == sorted(second.tolist())
    assert first.tolist() != second.tolist()
    assert torch.equal(order(0, 0, 50), first)  # and nothing remembers what was asked before


def test_slices_of_an_order_concatenate_to_the_order_across_blocks() -> None:
    order = EpochSampler(3, 10, replacement=True)
    whole = order(0, 4000, 9000)
    assert torch.equal(torch.cat([order(0, i, i + 500) for i in range(4000, 9000, 500)]), whole)
    assert not torch.equal(order(0, 0, 900), order(0, 4096, 4996))  # no block is another's
