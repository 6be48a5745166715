"""Statements that hold for each estimate of their condition, whatever the constants are."""

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from ravine import estimate
from ravine.callbacks import EMA, LoRA, OptimizerPlan, Quantization
from ravine.callbacks.estimates.devices import find_device
from ravine.callbacks.estimates.estimate import Estimate, make_estimate
from ravine.callbacks.estimates.layouts import LayoutCalculator, Ranks, preset_plan
from ravine.callbacks.estimates.module_traits import ModuleTraits, describe_module
from ravine.cli.estimation import RunToEstimate, resolve_ranks
from ravine.datamodules import TextDataModule
from ravine.lightning_modules import LanguageModel

RANKS = (2, 4, 8)
ZERO = ("zero1", "zero2", "zero3")
SHAPE: dict[str, Any] = {"num_layers": 8, "d_model": 64, "num_heads": 8}
TRUTHS: list[Callable[[], None]] = []


def truth(function: Callable[[], None]) -> Callable[[], None]:
    TRUTHS.append(function)
    return function


def text(batch_size: int) -> TextDataModule:
    return TextDataModule(source="embedded", context_length=32, batch_size=batch_size)


@functools.cache
def run() -> Any:
    """8 equal blocks and AdamW, simulated on one rank with 8 samples."""
    arguments = {"callbacks": [OptimizerPlan(torch.optim.AdamW)], "max_steps": 9}
    found = RunToEstimate(
        LanguageModel(**SHAPE),
        {"datamodule": text(8)},
        arguments,
        resolve_ranks(1, 1, None),
        None,
        "auto",
        "simulate",
    )
    return found, found.simulate()


@functools.cache
def layouts(n: int, recomputed: bool = False, nodes: int = 1) -> dict[str, Any]:
    """The layouts on n ranks, each with the micro-batch of the simulation."""
    described, simulation = run()
    step = simulation.alternative if recomputed else simulation
    calculator = LayoutCalculator(
        step, described.traits, Ranks(n // nodes, nodes), is_half=False, divides_batch=False
    )
    return {layout.name: layout for layout in calculator.all_layouts()}


@functools.cache
def small(name: str = "", batch_size: int = 4, **changes: Any) -> Estimate:
    """One block; `name` adds callbacks."""
    added: dict[str, list[Any]] = {
        "": [], "EMA": [EMA()], "LoRA": [LoRA(rank=4)], "NF4": [LoRA(rank=4), Quantization()]
    }  # fmt: skip
    shape = SHAPE | {"num_layers": 1}
    callbacks = [OptimizerPlan(torch.optim.AdamW), *added[name]]
    return estimate(
        LanguageModel(**shape), text(batch_size), callbacks=callbacks, max_steps=9, **changes
    )


def sizes(name: str, kind: str) -> list[float]:
    return [layouts(n)[name].classes[kind] for n in RANKS]


def padded(parameters: Any, n: int) -> int:
    """Bytes of shards with ceil(rows / n) rows."""
    return sum(
        math.ceil(p.shape[0] / n) * math.prod(p.shape[1:]) * p.itemsize if p.shape else p.itemsize
        for p in parameters
    )


def is_falling(numbers: list[float]) -> bool:
    return all(a >= b for a, b in itertools.pairwise(numbers))


@truth
def zero3_has_the_padded_shards_of_all_parameters() -> None:
    for n in (2, 3, 5, 8, 64):
        assert layouts(n)["zero3"].classes["parameters"] == padded(run()[1].parameters, n)


@truth
def the_states_of_adamw_are_two_shards_and_a_step_count() -> None:
    for n in (2, 3, 8):
        parameters = run()[1].parameters
        expected = 2 * padded(parameters, n) + 4 * len(parameters)
        assert layouts(n)["zero3"].classes["optimizer state"] == expected
        assert layouts(n)["zero2"].classes["optimizer state"] == expected


@truth
def zero1_owns_states_of_whole_parameters() -> None:
    for n in RANKS:
        state = layouts(n)["zero1"].classes["optimizer state"]
        whole = run()[1].state_bytes
        largest = max(p.state_bytes for p in run()[1].parameters)
        assert whole / n <= state <= whole / n + largest


@truth
def states_never_grow_with_the_ranks() -> None:
    assert all(is_falling(sizes(name, "optimizer state")) for name in ZERO)


@truth
def parameters_of_a_shard_never_grow_with_the_ranks() -> None:
    assert all(is_falling(sizes(name, "parameters")) for name in ZERO)


@truth
def the_peak_never_grows_from_2_to_4_to_8_ranks_of_8_equal_blocks() -> None:
    for name in ("ddp", *ZERO, "tp", "sp", "cp", "pp"):
        assert is_falling([layouts(n)[name].peak_bytes for n in RANKS]), name


@truth
def the_stages_of_zero_need_less_memory_one_after_another() -> None:
    for n in (4, 8):
        rows = layouts(n)
        states = [rows[name].classes["optimizer state"] for name in ("ddp", "zero2", "zero3")]
        assert is_falling(states)
        assert rows["zero3"].peak_bytes <= rows["zero2"].peak_bytes
        assert rows["zero1"].peak_bytes <= rows["ddp"].peak_bytes


@truth
def hsdp_keeps_the_shards_of_half_the_ranks() -> None:
    for n in (4, 8):
        shard, half = layouts(n)["hsdp"].classes, layouts(n // 2)["zero3"].classes
        assert shard["parameters"] == half["parameters"]
        assert shard["optimizer state"] == half["optimizer state"]


@truth
def ddp_has_everything_on_each_rank() -> None:
    for n in RANKS:
        classes = layouts(n)["ddp"].classes
        assert classes["parameters"] == 4 * sum(p.numel for p in run()[1].parameters)
        assert classes["gradients"] == classes["parameters"]
        assert classes["optimizer state"] == run()[1].state_bytes


@truth
def recomputation_never_holds_more_saved_activations() -> None:
    def at_the_end_of_the_forward_pass(step: Any) -> int:
        (end,) = (mark for mark in step.marks if mark.kind == "end")
        return step.moments[end.moment].of("activations")

    step = small(full=True).simulation  # without extrapolation all marks are there
    assert step.alternative is not None
    stored, recomputed = map(at_the_end_of_the_forward_pass, (step, step.alternative))
    assert recomputed < stored


@truth
def recomputation_never_raises_the_peak_of_8_equal_blocks() -> None:
    for n in RANKS:
        for name in layouts(n):
            assert layouts(n, True)[name].peak_bytes <= layouts(n)[name].peak_bytes, name


@truth
def recomputation_costs_a_third_more_flops_of_the_blocks_at_most() -> None:
    step = run()[1]
    assert step.flops < step.alternative.flops <= 4 / 3 * step.flops


@truth
def recomputation_changes_neither_parameters_nor_states() -> None:
    for name, layout in layouts(4).items():
        for kind in ("parameters", "optimizer state"):
            assert layouts(4, True)[name].classes[kind] == layout.classes[kind]


@truth
def a_larger_micro_batch_never_needs_less() -> None:
    peaks = [small(batch_size=size).peak_bytes for size in (2, 4, 8)]
    assert peaks == sorted(peaks)
    assert peaks[0] < peaks[-1]


@truth
def flops_are_proportional_to_the_micro_batch() -> None:
    assert small(batch_size=8).simulation.flops == 2 * small(batch_size=4).simulation.flops


@truth
def micro_batches_divide_the_batch_and_keep_the_flops_of_a_step() -> None:
    one, two = small(batch_size=8), small(batch_size=8, accumulate_grad_batches=2)
    assert two.simulation.samples * 2 == one.simulation.samples
    assert two.flops_per_step == one.flops_per_step
    assert two.peak_bytes <= one.peak_bytes


@truth
def adapters_have_rank_times_inputs_and_outputs() -> None:
    adapted = small("LoRA")
    factors = [p for p in adapted.simulation.parameters if "lora" in p.name]
    base = {p.name: p for p in small().simulation.parameters}
    expected = 0
    for p in adapted.simulation.parameters:
        name = p.name
        if len(p.shape) == 2 and name in base and any(name[:-7] in f.name for f in factors):
            expected += 4 * sum(p.shape)
    assert expected > 0
    assert adapted.num_trainable == expected == sum(f.numel for f in factors)


@truth
def adapters_have_gradients_and_states_only_of_themselves() -> None:
    adapted = small("LoRA")
    trainable = [p for p in adapted.simulation.parameters if p.is_trainable]
    assert adapted.state_bytes == 8 * adapted.num_trainable + 4 * len(trainable)
    assert max(m.of("gradients") for m in adapted.simulation.moments) == 4 * adapted.num_trainable


@truth
def four_bits_take_an_eighth_of_the_quantized_matrices_and_scales() -> None:
    whole, coded = small("LoRA"), small("NF4")
    before = {p.name: p for p in whole.simulation.parameters if not p.is_trainable}
    after = {p.name for p in coded.simulation.parameters}
    quantized = sum(p.num_bytes for name, p in before.items() if name not in after)
    assert quantized > 0
    total, coded_total = (
        sum(p.num_bytes for p in e.simulation.parameters) + e.simulation.buffer_bytes
        for e in (whole, coded)
    )
    codes = coded_total - (total - quantized)
    assert quantized / 8 < codes < quantized / 8 * 1.3


@truth
def an_average_is_one_copy_of_the_weights() -> None:
    copies = max(m.of("copies") for m in small("EMA").simulation.moments)
    assert copies >= 4 * small().num_parameters
    assert copies < 4.1 * small().num_parameters
    assert small("EMA").state_bytes == small().state_bytes


@truth
def half_precision_weights_have_half_the_bytes() -> None:
    half = small(precision="bf16-true")
    values, others = half.to_dict()["bytes"], small().to_dict()["bytes"]
    assert 2 * values["parameters"] == others["parameters"]
    assert 2 * values["gradients"] == others["gradients"]


@truth
def mixed_precision_keeps_parameters_and_states() -> None:
    mixed = small(precision="bf16-mixed")
    assert mixed.to_dict()["bytes"]["parameters"] == small().to_dict()["bytes"]["parameters"]
    assert mixed.state_bytes == small().state_bytes
    assert any(m.of("weight casts") for m in mixed.simulation.moments)


@truth
def the_kinds_of_parameters_add_up() -> None:
    result = small("LoRA").to_dict()["parameters"]
    assert sum(result["by_kind"].values()) == result["all"]
    assert result["trainable"] + result["frozen"] == result["all"]


@truth
def the_classes_of_each_layout_add_up_to_its_peak() -> None:
    for layout in layouts(8).values():
        assert sum(layout.classes.values()) == layout.peak_bytes
        assert min(layout.classes.values()) >= 0


@truth
def without_forward_pass_the_states_are_the_same() -> None:
    assert small(level="quick").state_bytes == small().state_bytes
    assert small(level="quick").num_parameters == small().num_parameters


@truth
def zero3_sends_half_more_than_ddp() -> None:
    for n in RANKS:
        rows = layouts(n)
        assert rows["zero3"].sent_bytes == pytest.approx(1.5 * rows["ddp"].sent_bytes)


@truth
def a_device_with_more_memory_takes_a_larger_micro_batch() -> None:
    numbers = []
    for memory in (0.7, 0.8, 1.6):
        described, simulation = run()
        device = find_device(None, memory, 100.0)
        ranks = Ranks(2)
        result = make_estimate(simulation, described.traits, ranks, device, "auto", "32-true")
        numbers.append([row.largest_micro_batch for row in result.rows])
    for fewer, more in itertools.pairwise(numbers):
        assert all(a < b for a, b in zip(fewer, more, strict=True))


@truth
def a_slower_link_never_makes_a_step_faster() -> None:
    described, simulation = run()
    device = find_device("h200")
    times = []
    for bandwidth in (450e9, 50e9, 1e9):
        ranks = Ranks(8, 1, bandwidth, "link", bandwidth)
        result = make_estimate(simulation, described.traits, ranks, device, "auto", "32-true")
        times.append([row.time.seconds for row in result.rows if row.time is not None])
    for fast, slow in itertools.pairwise(times):
        assert all(a <= b for a, b in zip(fast, slow, strict=True))
    assert times[0] != times[-1]


@truth
def tp_never_splits_what_has_no_plan() -> None:
    outside = sum(p.num_bytes for p in run()[1].parameters if p.name not in run()[0].traits.splits)
    inside = sum(p.num_bytes for p in run()[1].parameters) - outside
    for n in RANKS:
        assert layouts(n)["tp"].classes["parameters"] == outside + inside / n


@truth
def sp_stores_at_most_what_tp_stores() -> None:
    for n in RANKS:
        assert layouts(n)["sp"].peak_bytes <= layouts(n)["tp"].peak_bytes


@truth
def the_stages_of_a_pipeline_have_all_blocks_once() -> None:
    described, simulation = run()
    calculator = LayoutCalculator(simulation, described.traits, Ranks(8), False, False)
    for size in (2, 4, 8):
        plan = preset_plan("pp", Ranks(size))
        first, last = calculator._stages(plan)
        assert first.num_blocks == last.num_blocks == 8 // size
        assert first.num_in_flight == size
        assert last.num_in_flight == 1
        ends = {p.name for p in simulation.parameters} - set(described.traits.block_of)
        assert ends <= first.names | last.names


@truth
def a_node_of_8_gives_each_rank_of_several_nodes_the_same_split_matrices() -> None:
    one, four = layouts(8)["tp"], layouts(32, nodes=4)["tp"]
    assert four.plan.degrees["tp"] == one.plan.degrees["tp"] == 8
    assert four.classes["parameters"] < one.classes["parameters"]


@truth
def a_module_without_plans_is_sharded_only() -> None:
    traits = ModuleTraits(units=describe_module(torch.nn.Linear(2, 2)).units)
    _, simulation = run()
    calculator = LayoutCalculator(
        replace(simulation), traits, Ranks(8), is_half=False, divides_batch=False
    )
    names = {layout.name for layout in calculator.all_layouts()}
    assert names == {"ddp", "zero1", "zero2", "zero3", "hsdp"}
    assert set(calculator.reasons) == {"tp", "sp", "cp", "ep", "pp", "2d", "3d"}


@pytest.mark.parametrize("statement", TRUTHS, ids=lambda function: function.__name__)
def test_it_is_true(statement: Callable[[], None]) -> None:
    statement()


def test_there_are_at_least_30() -> None:
    assert len(TRUTHS) >= 30
