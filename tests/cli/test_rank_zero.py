"""Ranks that cannot agree on the checkpoint of `--ckpt_path=auto` raise a one-line error."""

import json
import socket

import pytest
from torch.distributed import TCPStore

from ravine.cli import error_report, rank_zero
from ravine.errors import UsageError
from ravine.strategies import CheckpointError


@pytest.fixture
def port(monkeypatch):
    """A free port, for a store that this process has not opened yet."""
    monkeypatch.setattr(rank_zero, "_open_stores", [])
    monkeypatch.setattr(rank_zero, "CONNECT_TIMEOUT_S", 0.2)
    monkeypatch.setattr(rank_zero, "CLOSE_TIMEOUT_S", 0.0)
    monkeypatch.setattr(rank_zero, "PORT_OFFSET", 0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def in_job(monkeypatch, rank, port):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)


def three_parts(text, port):
    given, allowed, fix = text.split("\n")
    assert given.startswith(
        f"the ranks cannot connect to 127.0.0.1:{port} to agree on a checkpoint: "
    )
    assert allowed == "  allowed: a port of this address that every rank can reach"
    assert fix == "  type: --ckpt_path=FILE"


def test_the_error_of_a_rank_without_a_store_names_the_address(monkeypatch, port):
    in_job(monkeypatch, 1, port)
    with pytest.raises(UsageError) as error:
        rank_zero.call_on_rank_zero(lambda: "a.ckpt")
    three_parts(error_report.message_of(error.value, []), port)


def test_rank_0_with_a_used_port_is_an_error_only_if_it_has_a_path_to_send(monkeypatch, port):
    in_job(monkeypatch, 0, port)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        with pytest.raises(UsageError) as error:
            rank_zero.call_on_rank_zero(lambda: "a.ckpt")
        assert rank_zero.call_on_rank_zero(None) is None  # maybe no rank waits
    three_parts(error_report.message_of(error.value, []), port)


def test_the_end_of_rank_0_ends_a_rank_that_waits(monkeypatch, port):
    in_job(monkeypatch, 1, port)
    store = TCPStore("127.0.0.1", port, None, True, wait_for_workers=False)
    rank_zero._open_store(rank_zero.detect_job())
    del store
    with pytest.raises(RuntimeError, match="rank 0 ended before it found") as error:
        rank_zero.call_on_rank_zero(lambda: "a.ckpt")
    assert "in the output of rank 0" in str(error.value)
    assert "\n" not in str(error.value)


def test_the_other_ranks_raise_the_error_of_rank_0_with_its_parts() -> None:
    error = UsageError("no checkpoint is called 'lst'", ["last"], flag="--x=last", label="nearest")
    again = UsageError(**json.loads(json.dumps(rank_zero.usage_error_parts(error))))
    assert error_report.message_of(again, []) == error_report.message_of(error, [])
    error = CheckpointError("a.ckpt is damaged", "a whole file", "use b.ckpt", flag="--x=b.ckpt")
    again = UsageError(**json.loads(json.dumps(rank_zero.usage_error_parts(error))))
    assert error_report.message_of(again, []) == error_report.message_of(error, [])
    assert rank_zero.usage_error_parts(OSError("no such folder")) == {"problem": "no such folder"}
