"""Comparison of the ranks' configurations: the message for values that differ."""

import torch.distributed as dist

from ravine.strategies.rank_agreement import MAX_SHOWN_CHARS, RankMismatchError, check_same_config

LONG = "x" * 200  # longer than a message shows
CASES = [  # the values of the ranks 0 and 1, and texts of the message
    (("a.txt", "b.txt"), ('"a.txt" on rank 0', '"b.txt" on rank 1')),
    ((LONG + "a.txt", LONG + "b.txt"), ('xa.txt" on rank 0', 'xb.txt" on rank 1')),
    ((LONG, LONG + LONG), ('x" on rank 0', "x... on rank 1")),
    (("a" + LONG, "b" + LONG), ('is "axx', 'and "bxx')),
]


def messages_of_a_rank() -> list[str]:
    dist.init_process_group("gloo")
    messages = []
    for values, _ in CASES:
        try:
            check_same_config({"data.path": values[dist.get_rank()]})
        except RankMismatchError as error:
            messages.append(error.problem)
    dist.destroy_process_group()
    return messages


def test_the_message_has_the_part_in_which_two_values_differ(ranks) -> None:
    first, second = ranks(messages_of_a_rank, 2)
    assert first == second
    for message, (_, shown) in zip(first, CASES, strict=True):
        assert all(text in message for text in shown), message
        assert len(message) < 150 + 2 * MAX_SHOWN_CHARS
